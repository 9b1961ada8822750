// Package scheduler turns instants into work: when a record is due it admits a rotation by commit, or rings for a worker. Any
// number of schedulers may run; none leads.
package scheduler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Ledger is the part of a ledger that a scheduler needs.
type Ledger interface {
	Get(ctx context.Context, id credential.ID) (credential.Record, uint64, error)
	List(ctx context.Context) ([]credential.Record, error)
	Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error)
	// Ring rings for a worker; the same id and rev rung twice within the queue's memory is one doorbell.
	Ring(ctx context.Context, lane credential.Lane, target string, id credential.ID, rev uint64) error
	// Dues calls fn for every record that has become due, at most limit at once, until ctx ends. An error of fn asks for
	// another call.
	Dues(ctx context.Context, limit int, fn func(ctx context.Context, id credential.ID) error) error
	// Schedules lists the records that have a schedule set, Rearm sets a missing one again, at the record's due instant.
	Schedules(ctx context.Context) (map[credential.ID]uint64, error)
	Rearm(ctx context.Context, id credential.ID) error
	Incidents(ctx context.Context) ([]credential.Incident, error)
	GetIncident(ctx context.Context, id string) (credential.Incident, uint64, error)
	UpdateIncident(ctx context.Context, i credential.Incident, seq uint64) (uint64, error)
	WatchIncidents(ctx context.Context, fn func(credential.Incident), ready func()) error
	WatchControl(ctx context.Context, fn func(credential.Control), ready func()) error
}

// Config of a Scheduler. Ledger is required.
type Config struct {
	Ledger Ledger
	// Name identifies this scheduler in audit entries; default "scheduler".
	Name string
	// Sweep is the time between two sweeps; default 3 minutes.
	Sweep time.Duration
	// Rotations that are more than LateAfter late (default 5 minutes) are spread over LateWindow (default 15 minutes).
	LateAfter, LateWindow time.Duration
	Now                   func() time.Time
	Logger                *slog.Logger
}

// Scheduler admits and rings.
type Scheduler struct {
	Config
	paused atomic.Bool // the fleet-wide pause, as last seen
}

// New fills in the defaults of c.
func New(c Config) *Scheduler {
	if c.Name == "" {
		c.Name = "scheduler"
	}
	if c.Sweep == 0 {
		c.Sweep = 3 * time.Minute
	}
	if c.LateAfter == 0 {
		c.LateAfter = 5 * time.Minute
	}
	if c.LateWindow == 0 {
		c.LateWindow = 15 * time.Minute
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Scheduler{Config: c}
}

// Run works until ctx ends, and returns nil then. It sweeps at its start, so that nothing that became due while no
// scheduler ran is forgotten.
func (s *Scheduler) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	kick, ready := make(chan struct{}, 1), make(chan struct{})
	g.Go(func() error {
		return s.Ledger.WatchControl(ctx, func(c credential.Control) {
			if s.paused.Swap(c.Paused) && !c.Paused { // what became due meanwhile rang in vain
				select {
				case kick <- struct{}{}:
				default:
				}
			}
		}, func() { close(ready) })
	})
	g.Go(func() error {
		select {
		case <-ready:
			return s.Ledger.Dues(ctx, dueLimit, s.Handle)
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error {
		return s.Ledger.WatchIncidents(ctx, func(i credential.Incident) {
			if !i.Expanded {
				g.Go(func() error { s.insist(ctx, i); return nil })
			}
		}, nil)
	})
	g.Go(func() error {
		select {
		case <-ready:
			s.sweeps(ctx, kick)
		case <-ctx.Done():
		}
		return nil
	})
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// orderPause is the wait before an order that could not be carried out is tried again.
const orderPause = 2 * time.Second

// insist carries out an order, again and again until that succeeds or ctx ends: an emergency does not wait for a sweep.
func (s *Scheduler) insist(ctx context.Context, i credential.Incident) {
	for {
		err := s.Expand(ctx, i)
		if err == nil || ctx.Err() != nil {
			return
		}
		s.Logger.Error("an order could not be carried out yet; it is tried again", "incident", i.ID, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(orderPause):
		}
	}
}

// sweeps sweeps at once, then at each interval and whenever it is kicked, until ctx ends.
func (s *Scheduler) sweeps(ctx context.Context, kick <-chan struct{}) {
	ticker := time.NewTicker(s.Sweep)
	defer ticker.Stop()
	for {
		if err := s.SweepOnce(ctx); err != nil && ctx.Err() == nil {
			s.Logger.Error("sweep", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-kick:
		}
	}
}

// dueLimit is how many due records one scheduler looks at at once: enough to fill the ledger's group commits.
const dueLimit = 64

// earlyWait is how much earlier than the record's due instant a doorbell may come (two clocks) and still be waited for.
const earlyWait = 2 * time.Second

// Handle looks at a record that may have become due: it arms the calendar, admits, or rings for a worker. A doorbell that is
// stale or too early does nothing. An error asks for another call.
func (s *Scheduler) Handle(ctx context.Context, id credential.ID) error {
	for {
		r, seq, err := s.Ledger.Get(ctx, id)
		if errors.Is(err, credential.ErrNotFound) || errors.Is(err, credential.ErrSchema) {
			s.Logger.Warn("doorbell for a record that cannot be worked on", "credential", string(id), "error", err)
			return nil
		}
		if err != nil {
			return fmt.Errorf("load record %s: %w", id, err)
		}
		now := s.Now()
		if r.Due.IsZero() {
			return nil
		}
		if early := r.Due.Sub(now); early > 0 {
			if early > earlyWait {
				return nil // replaced by a later schedule
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(early):
			}
			continue
		}
		if r.Phase != credential.Idle {
			if s.paused.Load() && !r.Urgent() {
				return nil // the end of the pause sweeps
			}
			return s.ring(ctx, r)
		}
		in := s.decide(r, now)
		if in == nil {
			return nil
		}
		next, _, err := credential.Next(r, in, now)
		if errors.Is(err, credential.ErrRefused) || err == nil && next.Rev == r.Rev {
			return nil
		}
		if err != nil {
			return err
		}
		_, err = s.Ledger.Commit(ctx, next, seq)
		switch {
		case errors.Is(err, credential.ErrStale), errors.Is(err, credential.ErrUncertain):
			continue
		case err != nil:
			return fmt.Errorf("commit %s: %w", id, err)
		case next.Phase == credential.Idle:
			if !next.Due.IsZero() && !next.Due.After(s.Now()) {
				continue
			}
			return nil
		}
		s.Logger.Info("admitted", "credential", string(id), "target", next.Spec.Target, "generation", next.Generation, "reason", next.Reason)
		return s.ring(ctx, next)
	}
}

// decide evaluates the calendar for an idle record that is due; nil means nothing.
func (s *Scheduler) decide(r credential.Record, now time.Time) credential.Input {
	tick := credential.Tick{Worker: s.Name}
	switch {
	case !r.Managed || r.Parked != nil || r.Paused:
		return tick // at most to announce that it is overdue
	case r.NextRotation.IsZero():
		at := NextInstant(r, now)
		if at.IsZero() {
			return tick
		}
		return credential.Request{Verb: credential.Arm, Actor: s.Name, At: at}
	case now.Before(r.NextRotation) || s.paused.Load():
		return tick
	}
	if at := Catchup(r, now, s.LateAfter, s.LateWindow); at.After(now) {
		return credential.Request{Verb: credential.Arm, Actor: s.Name, At: at}
	}
	return credential.Request{Verb: credential.Admit, Actor: s.Name, Reason: reason(r)}
}

// reason says why a due rotation is admitted.
func reason(r credential.Record) string {
	switch {
	case r.Generation == 0:
		return "initial"
	case r.Failed > 0:
		return "retry"
	default:
		return "interval"
	}
}

func (s *Scheduler) ring(ctx context.Context, r credential.Record) error {
	if err := s.Ledger.Ring(ctx, r.Lane(), r.Spec.Target, r.ID, r.Rev); err != nil {
		return fmt.Errorf("ring for %s: %w", r.ID, err)
	}
	return nil
}
