package simledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

func name(what, s string) error {
	if !credential.ValidName(s) {
		return fmt.Errorf("%s %.80q: not a name", what, s)
	}
	return nil
}

// GetTarget loads a target and its sequence.
func (l *Ledger) GetTarget(ctx context.Context, target string) (credential.Target, uint64, error) {
	if err := name("target", target); err != nil {
		return credential.Target{}, 0, err
	}
	return get[credential.Target](ctx, l, "target/"+target)
}

// PutTarget writes a target by compare-and-set.
func (l *Ledger) PutTarget(ctx context.Context, t credential.Target, seq uint64) (uint64, error) {
	if err := name("target", t.Name); err != nil {
		return 0, err
	}
	return l.put(ctx, "target/"+t.Name, t, seq)
}

// DeleteTarget removes the target with sequence seq.
func (l *Ledger) DeleteTarget(ctx context.Context, target string, seq uint64) error {
	if err := errors.Join(name("target", target), ctx.Err()); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cells["target/"+target].seq != seq {
		return fmt.Errorf("delete target %s: %w", target, credential.ErrStale)
	}
	l.write("target/"+target, nil)
	return nil
}

// Targets lists every target.
func (l *Ledger) Targets(ctx context.Context) ([]credential.Target, error) {
	return list[credential.Target](ctx, l, "target/")
}

// WatchTargets calls fn with every target and every change; nil: deleted.
func (l *Ledger) WatchTargets(ctx context.Context, fn func(string, *credential.Target), ready func()) error {
	return watch(ctx, l, "target/", fn, ready)
}

// CreateIncident writes a new order, or returns the stored one with ErrStale.
func (l *Ledger) CreateIncident(ctx context.Context, inc credential.Incident) (credential.Incident, uint64, error) {
	if err := name("incident", inc.ID); err != nil {
		return credential.Incident{}, 0, err
	}
	seq, err := l.put(ctx, "incident/"+inc.ID, inc, 0)
	if errors.Is(err, credential.ErrStale) {
		stored, at, gerr := l.GetIncident(ctx, inc.ID)
		return stored, at, errors.Join(err, gerr)
	}
	return inc, seq, err
}

// UpdateIncident writes over the order with sequence seq.
func (l *Ledger) UpdateIncident(ctx context.Context, inc credential.Incident, seq uint64) (uint64, error) {
	if err := name("incident", inc.ID); err != nil {
		return 0, err
	}
	if seq == 0 {
		return 0, fmt.Errorf("update incident %s: no sequence", inc.ID)
	}
	return l.put(ctx, "incident/"+inc.ID, inc, seq)
}

// GetIncident loads an order and its sequence.
func (l *Ledger) GetIncident(ctx context.Context, id string) (credential.Incident, uint64, error) {
	if err := name("incident", id); err != nil {
		return credential.Incident{}, 0, err
	}
	return get[credential.Incident](ctx, l, "incident/"+id)
}

// Incidents lists every order.
func (l *Ledger) Incidents(ctx context.Context) ([]credential.Incident, error) {
	return list[credential.Incident](ctx, l, "incident/")
}

// WatchIncidents calls fn with every order and every change.
func (l *Ledger) WatchIncidents(ctx context.Context, fn func(credential.Incident), ready func()) error {
	return watch(ctx, l, "incident/", func(_ string, inc *credential.Incident) {
		if inc != nil {
			fn(*inc)
		}
	}, ready)
}

// GetControl loads the fleet's switch.
func (l *Ledger) GetControl(ctx context.Context) (credential.Control, uint64, error) {
	c, seq, err := get[credential.Control](ctx, l, "control")
	if errors.Is(err, credential.ErrNotFound) {
		return credential.Control{}, seq, nil
	}
	return c, seq, err
}

// SetControl writes the fleet's switch by compare-and-set.
func (l *Ledger) SetControl(ctx context.Context, c credential.Control, seq uint64) (uint64, error) {
	return l.put(ctx, "control", c, seq)
}

// WatchControl calls fn with the fleet's switch and every change.
func (l *Ledger) WatchControl(ctx context.Context, fn func(credential.Control), ready func()) error {
	return watch(ctx, l, "control", func(_ string, c *credential.Control) {
		if c == nil {
			c = &credential.Control{}
		}
		fn(*c)
	}, ready)
}

// CatchUp is nil: nothing lags here.
func (l *Ledger) CatchUp(ctx context.Context) error { return ctx.Err() }

// SourceLag is zero: nothing lags here.
func (l *Ledger) SourceLag(ctx context.Context) ([]ledger.Lag, error) {
	return []ledger.Lag{{Stream: ledger.EventStream}, {Stream: ledger.AuditStream}}, ctx.Err()
}

// Events calls fn with each event that q selects.
func (l *Ledger) Events(ctx context.Context, q ledger.Query, fn func(events.Event) error) error {
	return follow(ctx, l, q, func() []events.Event { return l.events }, func(e events.Event, i uint64) error {
		if !selects(q, credential.ID(e.Subject), e.Time) || len(q.Types) > 0 && !slices.Contains(q.Types, e.Type) {
			return nil
		}
		return fn(e)
	})
}

// Audit calls fn with each audit entry that q selects.
func (l *Ledger) Audit(ctx context.Context, q ledger.Query, fn func(credential.Entry, uint64) error) error {
	return follow(ctx, l, q, func() []credential.Entry { return l.entries }, func(e credential.Entry, i uint64) error {
		if !selects(q, e.Credential, e.At) {
			return nil
		}
		return fn(e, i)
	})
}

func selects(q ledger.Query, id credential.ID, at time.Time) bool {
	return (q.Team == "" || q.Team == id.Team()) && (q.Name == "" || q.Name == id.Name()) && !at.Before(q.Since)
}

func follow[T any](ctx context.Context, l *Ledger, q ledger.Query, all func() []T, fn func(T, uint64) error) error {
	if err := q.Validate(); err != nil {
		return err
	}
	next := q.After
	for {
		l.mu.Lock()
		have, changed := all(), l.changed
		l.mu.Unlock()
		for ; next < uint64(len(have)); next++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(have[next], next+1); err != nil {
				return err
			}
		}
		if !q.Follow {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Observe fills in what the oracle credential.Audit needs of a ledger: records, audit entries and events, at one instant.
func (l *Ledger) Observe() credential.Observation {
	records, _ := list[credential.Record](context.Background(), l, "record/")
	l.mu.Lock()
	defer l.mu.Unlock()
	o := credential.Observation{Now: l.cfg.Now(), Records: records, Entries: slices.Clone(l.entries), Events: []credential.Seen{}}
	for _, e := range l.events {
		o.Events = append(o.Events, credential.Seen{
			Credential: credential.ID(e.Subject), Type: notice(e.Type), Rev: e.Data.Rev, ID: e.ID,
		})
	}
	return o
}

// notice is the notice's type of an event's.
func notice(eventType string) string { return "credential." + events.Short(eventType) }
