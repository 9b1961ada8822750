package scheduler

import (
	"context"
	"errors"
	"fmt"

	"github.com/rekeyhq/rekey/internal/credential"
)

// SweepOnce repairs what was lost beside the ledger: doorbells of due records, schedules of records to come, and orders that had
// not reached all their records. It is idempotent, and safe beside other schedulers.
func (s *Scheduler) SweepOnce(ctx context.Context) error {
	var errs []error
	incidents, err := s.Ledger.Incidents(ctx)
	errs = append(errs, err)
	for _, i := range incidents {
		errs = append(errs, s.Expand(ctx, i))
	}
	// A record that cannot be read is no reason to leave the others alone: List gives those that can.
	records, err := s.Ledger.List(ctx)
	errs = append(errs, err)
	scheduled, schedErr := s.Ledger.Schedules(ctx)
	errs = append(errs, schedErr)
	now := s.Now()
	for _, r := range records {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case r.Due.IsZero():
		case !r.Due.After(now):
			errs = append(errs, s.Handle(ctx, r.ID))
		case schedErr == nil:
			if _, ok := scheduled[r.ID]; !ok {
				s.Logger.Warn("schedule was missing", "credential", string(r.ID))
				errs = append(errs, s.Ledger.Rearm(ctx, r.ID))
			}
		}
	}
	return errors.Join(errs...)
}

// Expand carries an emergency order to every record on its list and rings for each on the revoke lane; then it marks the order as
// expanded. Repeated after a crash at any instant it goes on where it was: a record takes the same order only once.
func (s *Scheduler) Expand(ctx context.Context, i credential.Incident) error {
	if i.Expanded {
		return nil
	}
	// What was seen may be old: an order that was carried out already must not reach a credential that was restored since.
	stored, seq, err := s.Ledger.GetIncident(ctx, i.ID)
	if err != nil || stored.Expanded {
		return err
	}
	if stored.Sum() != stored.Hash {
		return fmt.Errorf("expand incident %s: its list is not the one that was approved: nothing is carried out", i.ID)
	}
	var errs []error
	for _, id := range stored.Credentials {
		errs = append(errs, s.order(ctx, stored, id))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("expand incident %s: %w", i.ID, err)
	}
	stored.Expanded = true
	if _, err := s.Ledger.UpdateIncident(ctx, stored, seq); err != nil && !errors.Is(err, credential.ErrStale) {
		return fmt.Errorf("close incident %s: %w", i.ID, err)
	}
	return nil
}

// order commits the order to one record and rings.
func (s *Scheduler) order(ctx context.Context, i credential.Incident, id credential.ID) error {
	verb := credential.Kill
	if i.Mode == credential.ModeReplace {
		verb = credential.Replace
	}
	for {
		r, seq, err := s.Ledger.Get(ctx, id)
		if errors.Is(err, credential.ErrNotFound) || errors.Is(err, credential.ErrSchema) {
			s.Logger.Warn("an order names a credential that does not exist, or that a newer build wrote", "incident", i.ID, "credential", string(id))
			return nil
		}
		if err != nil {
			return err
		}
		next, _, err := credential.Next(r, credential.Request{Verb: verb, Actor: i.Actor, Reason: i.Reason, Incident: i.ID}, s.Now())
		switch {
		case errors.Is(err, credential.ErrRefused):
			s.Logger.Warn("a record refused an order", "incident", i.ID, "credential", string(id), "error", err)
			return nil
		case err != nil:
			return err
		case next.Rev == r.Rev: // it has the order: the doorbell may have been lost
			if r.Urgent() {
				return s.ring(ctx, r)
			}
			return nil
		}
		_, err = s.Ledger.Commit(ctx, next, seq)
		switch {
		case err == nil:
			return s.ring(ctx, next)
		case errors.Is(err, credential.ErrStale), errors.Is(err, credential.ErrUncertain):
		default:
			return err
		}
	}
}
