package ledger

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"

	"github.com/rekeyhq/rekey/internal/credential"
)

// GetTarget loads a target and its sequence; ErrNotFound if there is none.
func (l *Ledger) GetTarget(ctx context.Context, name string) (credential.Target, uint64, error) {
	if err := checkToken("target", name); err != nil {
		return credential.Target{}, 0, err
	}
	return get[credential.Target](ctx, l, targetPrefix+name)
}

// PutTarget writes a target over the one with sequence seq; 0: there must be none. It returns the new sequence, or ErrStale.
func (l *Ledger) PutTarget(ctx context.Context, t credential.Target, seq uint64) (uint64, error) {
	if err := checkToken("target", t.Name); err != nil {
		return 0, err
	}
	return l.put(ctx, targetPrefix+t.Name, t, seq)
}

// DeleteTarget removes the target with sequence seq, or is ErrStale. The name may be used again.
func (l *Ledger) DeleteTarget(ctx context.Context, name string, seq uint64) error {
	if err := checkToken("target", name); err != nil {
		return err
	}
	_, err := l.set(ctx, &nats.Msg{Subject: targetPrefix + name, Header: nats.Header{kvOperation: {"DEL"}}}, seq)
	return err
}

// Targets lists every target.
func (l *Ledger) Targets(ctx context.Context) ([]credential.Target, error) {
	return list[credential.Target](ctx, l, targetPrefix)
}

// WatchTargets calls fn with every target and then with every change; nil means that the named one was deleted. See Watch.
func (l *Ledger) WatchTargets(ctx context.Context, fn func(name string, t *credential.Target), ready func()) error {
	return watch(ctx, l, targetPrefix+">", fn, ready)
}

// CreateIncident writes a new order. If the id exists, nothing is written: the stored order and its sequence come
// back with ErrStale, so that a repeat can tell whether it is the same.
func (l *Ledger) CreateIncident(ctx context.Context, inc credential.Incident) (credential.Incident, uint64, error) {
	if err := checkToken("incident", inc.ID); err != nil {
		return credential.Incident{}, 0, err
	}
	seq, err := l.put(ctx, incidentPrefix+inc.ID, inc, 0)
	if errors.Is(err, credential.ErrStale) {
		stored, at, gerr := l.GetIncident(ctx, inc.ID)
		if gerr != nil {
			return credential.Incident{}, 0, errors.Join(err, gerr)
		}
		return stored, at, fmt.Errorf("incident %s exists: %w", inc.ID, credential.ErrStale)
	}
	return inc, seq, err
}

// UpdateIncident writes over the order with sequence seq, which must not be 0, or is ErrStale.
func (l *Ledger) UpdateIncident(ctx context.Context, inc credential.Incident, seq uint64) (uint64, error) {
	if err := checkToken("incident", inc.ID); err != nil {
		return 0, err
	}
	if seq == 0 {
		return 0, fmt.Errorf("update incident %s: no sequence", inc.ID)
	}
	return l.put(ctx, incidentPrefix+inc.ID, inc, seq)
}

// GetIncident loads an order and its sequence; ErrNotFound if there is none.
func (l *Ledger) GetIncident(ctx context.Context, id string) (credential.Incident, uint64, error) {
	if err := checkToken("incident", id); err != nil {
		return credential.Incident{}, 0, err
	}
	return get[credential.Incident](ctx, l, incidentPrefix+id)
}

// Incidents lists every order, open and done.
func (l *Ledger) Incidents(ctx context.Context) ([]credential.Incident, error) {
	return list[credential.Incident](ctx, l, incidentPrefix)
}

// WatchIncidents calls fn with every order and then with every change. See Watch.
func (l *Ledger) WatchIncidents(ctx context.Context, fn func(credential.Incident), ready func()) error {
	return watch(ctx, l, incidentPrefix+">", func(_ string, inc *credential.Incident) {
		if inc != nil {
			fn(*inc)
		}
	}, ready)
}

// GetControl loads the fleet's switch; before it was ever set it is zero, with sequence 0.
func (l *Ledger) GetControl(ctx context.Context) (credential.Control, uint64, error) {
	c, seq, err := get[credential.Control](ctx, l, controlSubject)
	if errors.Is(err, credential.ErrNotFound) {
		return credential.Control{}, seq, nil
	}
	return c, seq, err
}

// SetControl writes the fleet's switch over the one with sequence seq, or is ErrStale.
func (l *Ledger) SetControl(ctx context.Context, c credential.Control, seq uint64) (uint64, error) {
	return l.put(ctx, controlSubject, c, seq)
}

// WatchControl calls fn with the fleet's switch, if it was ever set, and then with every change. See Watch.
func (l *Ledger) WatchControl(ctx context.Context, fn func(credential.Control), ready func()) error {
	return watch(ctx, l, controlSubject, func(_ string, c *credential.Control) {
		if c == nil {
			c = &credential.Control{}
		}
		fn(*c)
	}, ready)
}
