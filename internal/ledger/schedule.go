package ledger

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// The durable consumers that all schedulers and all workers share.
const (
	dueConsumer = "scheduler"
	ackConsumer = "acknowledgements"
)

// Dues calls fn with the id of every record whose schedule has rung, from at most limit goroutines. Any number of processes
// may do so: each ring goes to one of them, at least once, also late, when the record has changed since, and, after a crash
// of the server, for a schedule that was cancelled. nil from fn ends the ring; after an error it comes again. ctx as in Work.
func (l *Ledger) Dues(ctx context.Context, limit int, fn func(context.Context, credential.ID) error) error {
	return l.pull(ctx, LedgerStream, dueConsumer, limit, func(ctx context.Context, m jetstream.Msg) error {
		id, err := idFrom(duePrefix, m.Subject())
		if err != nil {
			return l.drop(m, err)
		}
		// The server purges the schedule's whole subject when a ring is stored. If a commit replaced the schedule after
		// the ring was made and before it was stored, the new schedule is gone. Only a ring can do that, so each ring looks.
		if err := l.Rearm(ctx, id); err != nil && !errors.Is(err, credential.ErrNotFound) {
			return err
		}
		return fn(ctx, id)
	})
}

// Rearm writes the schedule of a record that is due later and has none. It is a no-op otherwise, also when another
// commit comes between.
func (l *Ledger) Rearm(ctx context.Context, id credential.ID) error {
	r, _, err := l.Get(ctx, id)
	if err != nil {
		return err
	}
	if r.Due.IsZero() || !r.Due.After(l.cfg.Now()) {
		return nil
	}
	has, err := l.HasSchedule(ctx, id)
	if err != nil || has {
		return err
	}
	m := scheduleMessage(r)
	if _, err = l.set(ctx, m, 0); errors.Is(err, credential.ErrStale) {
		return nil // another commit wrote one
	}
	if err == nil {
		l.log.Info("schedule repaired", "credential", id, "due", r.Due)
	}
	return err
}

// HasSchedule reports whether the record has a schedule that has not rung.
func (l *Ledger) HasSchedule(ctx context.Context, id credential.ID) (bool, error) {
	if err := checkID(id); err != nil {
		return false, err
	}
	_, err := l.last(ctx, scheduleSubject(id))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Schedules is the set of credentials that have a schedule which has not rung, with the rev of the commit that wrote it.
func (l *Ledger) Schedules(ctx context.Context) (map[credential.ID]uint64, error) {
	set := map[credential.ID]uint64{}
	err := l.scan(ctx, scan{stream: LedgerStream, filter: schedulePrefix + "*.*", last: true}, func(m jetstream.Msg, _ *jetstream.MsgMetadata) error {
		id, err := idFrom(schedulePrefix, m.Subject())
		if err != nil {
			return err
		}
		set[id], _ = strconv.ParseUint(string(m.Data()), 10, 64)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list schedules: %w", err)
	}
	return set, nil
}
