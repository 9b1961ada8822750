package workers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sethvargo/go-retry"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// step performs one claimed effect within its deadline and says what came of it. An error means that the step was not even
// begun; the claim then runs out.
func (r *run) step(ctx context.Context, e credential.Effect, due time.Time) (credential.Outcome, error) {
	began := r.Now()
	if !began.Before(e.Deadline) {
		return credential.Outcome{}, fmt.Errorf("step %s: its time was over before it began", e.Phase)
	}
	// The deadline is compared in the ledger's clock and kept by the monotonic one.
	ctx, cancel := context.WithTimeout(ctx, e.Deadline.Sub(began))
	defer cancel()
	var out credential.Outcome
	err := r.attempt(ctx, e.Phase, func(ctx context.Context) error {
		var err error
		out, err = r.perform(ctx, e)
		return err
	})
	if err != nil {
		out.Result = credential.Failed
		out.Class, out.RetryAfter = rotators.ClassOf(err), rotators.RetryAfterOf(err)
		out.Message = err.Error()
	}
	out.Worker, out.Phase = r.name, e.Phase
	s := Step{Record: r.record, Outcome: out, Took: r.Now().Sub(began)}
	if !due.IsZero() {
		s.Late = max(0, began.Sub(due))
	}
	r.Observe(s)
	r.log.Info("step", "phase", string(e.Phase), "generation", e.Op.Generation, "op", e.Op.ID.String(),
		"target", r.record.Spec.Target, "result", string(out.Result), "detail", out.Message)
	return out, nil
}

// attempt is the one place of short retries: what changed nothing and may pass is tried again for QuickRetry, or, where a minted
// secret is held that exists nowhere else, until the deadline. Longer waits are committed as schedules.
func (r *run) attempt(ctx context.Context, phase credential.Phase, f func(context.Context) error) error {
	b := retry.WithMaxDuration(r.QuickRetry, retry.WithCappedDuration(time.Second, retry.NewExponential(50*time.Millisecond)))
	if phase == credential.Staging && !r.minted.Empty() {
		b = retry.WithCappedDuration(time.Second, retry.NewExponential(50*time.Millisecond))
	}
	var last error
	err := retry.Do(ctx, b, func(ctx context.Context) error {
		last = f(ctx)
		if last == nil {
			return nil
		}
		again := rotators.ClassOf(last) == rotators.Transient && rotators.RetryAfterOf(last) <= time.Second
		if again && r.Blocked(r.record) {
			again = false
		}
		if again || !r.minted.Empty() && phase == credential.Staging {
			return retry.RetryableError(last)
		}
		return last
	})
	if err != nil && last != nil {
		return last // retry.Do may answer with the context's error, which says less
	}
	return err
}

// issuer gives the pass's rotator.
func (r *run) issuer(ctx context.Context) (rotators.Rotator, error) {
	if r.rotator != nil {
		return r.rotator, nil
	}
	t, _, err := r.Ledger.GetTarget(ctx, r.record.Spec.Target)
	if err != nil {
		class := rotators.Transient
		if errors.Is(err, credential.ErrNotFound) {
			class = rotators.Refused
		}
		return nil, rotators.Faultf(class, "load target "+r.record.Spec.Target, "%w", err)
	}
	rot, err := r.Rotator(ctx, t, r.record)
	if err != nil {
		return nil, fmt.Errorf("make rotator for target %s: %w", t.Name, err)
	}
	r.rotator = rot
	return rot, nil
}

func (r *run) store() (store.Store, error) {
	s, err := r.Store(r.record.Spec.Store)
	if err != nil {
		return nil, rotators.Faultf(rotators.Refused, "open store "+r.record.Spec.Store, "%w", err)
	}
	return s, nil
}

// tools gives both, for the steps that need both.
func (r *run) tools(ctx context.Context) (rotators.Rotator, store.Store, error) {
	rot, err := r.issuer(ctx)
	if err != nil {
		return nil, nil, err
	}
	st, err := r.store()
	return rot, st, err
}

func (r *run) key(v credential.Version) store.Key {
	return store.Key{Credential: string(r.record.ID), Generation: v.Generation, OpID: v.OpID, Version: v.ID}
}

func (r *run) publishedKey(p credential.Published) store.Key {
	return store.Key{Credential: string(r.record.ID), Generation: p.Generation, OpID: p.OpID, Version: p.Version}
}

// perform carries out one effect. Each case may be repeated after a crash at any instant.
func (r *run) perform(ctx context.Context, e credential.Effect) (credential.Outcome, error) {
	switch e.Phase {
	case credential.Adopting:
		return r.adopt(ctx, e)
	case credential.Noting:
		return r.note(ctx, e)
	case credential.Minting:
		return r.mint(ctx, e)
	case credential.Attributing:
		return r.attribute(ctx, e)
	case credential.Staging:
		return r.stage(ctx, e)
	case credential.Applying:
		return r.apply(ctx, e)
	case credential.Checking, credential.Proving:
		return r.prove(ctx, e)
	case credential.Promoting:
		return r.promote(ctx, e)
	case credential.Reverting:
		return r.revert(ctx, e)
	case credential.Disabling:
		return r.retire(ctx, func(rot rotators.Rotator) error { return rot.Disable(ctx, e.Op, e.Version.ID) })
	case credential.ProvingDead:
		return r.proveDead(ctx, e)
	case credential.Deleting:
		return r.retire(ctx, func(rot rotators.Rotator) error { return rot.Delete(ctx, e.Op, e.Version.ID) })
	case credential.Destroying:
		return r.destroy(ctx)
	case credential.Withdrawing:
		return r.withdraw(ctx, e)
	case credential.Discarding:
		return r.discard(ctx, e)
	case credential.Killing, credential.SweepingKill:
		return r.kill(ctx, e)
	case credential.ProvingKill:
		return r.proveKill(ctx, e)
	case credential.Clearing:
		return r.clear(ctx, e)
	default:
		return credential.Outcome{}, rotators.Faultf(rotators.Refused, "perform", "phase %q has no effect", e.Phase)
	}
}

func finished() credential.Outcome { return credential.Outcome{Result: credential.Done} }
