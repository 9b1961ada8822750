// Package workers carries out what the protocol decides: it loads a record, asks credential.Next, commits the intent, acts,
// and commits the outcome together with the next intent, until the record says wait.
package workers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// Ledger is the part of a ledger that a worker needs. Commit compares and sets: it fails with credential.ErrStale if seq is
// not the record's latest, and with credential.ErrUncertain if it may have been written.
type Ledger interface {
	Get(ctx context.Context, id credential.ID) (credential.Record, uint64, error)
	Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error)
	GetTarget(ctx context.Context, name string) (credential.Target, uint64, error)
}

// Config of a Worker. Ledger, Rotator and Store are required.
type Config struct {
	// Name identifies this process among all workers, in claims and audit entries.
	Name   string
	Ledger Ledger
	// Rotator makes the rotator of one credential; the worker closes it.
	Rotator func(ctx context.Context, t credential.Target, r credential.Record) (rotators.Rotator, error)
	Store   func(name string) (store.Store, error)
	// Resolve reads a reference, for adoption only.
	Resolve func(ctx context.Context, reference string) ([]byte, error)
	// Blocked reports an open emergency order that has not reached the credential's record yet: no effect may start.
	Blocked func(r credential.Record) bool
	// Paused reports the fleet-wide pause.
	Paused func() bool
	// Observe is told of every performed step; nil for none.
	Observe func(Step)
	Now     func() time.Time
	Random  io.Reader // source of secrets; required where a kind does not mint
	Logger  *slog.Logger
	// QuickRetry is how long a step is retried in place before the retry is committed as a schedule; default 3 s.
	QuickRetry time.Duration
}

// Step is one performed effect, for metrics.
type Step struct {
	Record  credential.Record // as claimed
	Outcome credential.Outcome
	Took    time.Duration
	Late    time.Duration // how long after its due instant the step began
}

// Worker drives credentials. It may be used by many goroutines.
type Worker struct {
	Config
	runs atomic.Uint64
}

// New fills in the defaults of c.
func New(c Config) *Worker {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Blocked == nil {
		c.Blocked = func(credential.Record) bool { return false }
	}
	if c.Paused == nil {
		c.Paused = func() bool { return false }
	}
	if c.Observe == nil {
		c.Observe = func(Step) {}
	}
	if c.QuickRetry == 0 {
		c.QuickRetry = 3 * time.Second
	}
	return &Worker{Config: c}
}

// run is one pass over one credential. Each has a name of its own, so that two passes in one process fence each other as two
// processes would.
type run struct {
	*Worker
	name   string
	record credential.Record
	seq    uint64
	// rotator is made on first use and lives for the pass.
	rotator rotators.Rotator
	// minted is the secret that the issuer made and the store does not hold yet: it exists nowhere else.
	minted rotators.Material
	log    *slog.Logger
}

// Handle drives one credential until there is nothing to do before its next due instant. It is nil when the doorbell may be
// forgotten: also when it was stale, when another worker is at it, or when the record waits. An error means: ring again.
//
// When ctx ends, the step in flight is finished within its deadline and the next one is left unclaimed. A crash at any instant
// leaves a claim that runs out; whoever comes then goes on.
func (w *Worker) Handle(ctx context.Context, id credential.ID) error {
	r := &run{Worker: w, name: fmt.Sprintf("%s#%d", w.Name, w.runs.Add(1)), log: w.Logger.With("credential", string(id))}
	defer r.close()
	// What has begun is finished although ctx ends: every effect has a deadline of its own.
	steady := context.WithoutCancel(ctx)
	if err := r.load(steady, id); err != nil {
		if errors.Is(err, credential.ErrNotFound) || errors.Is(err, credential.ErrSchema) {
			r.log.Warn("doorbell for a record that cannot be worked on", "error", err)
			return nil
		}
		return err
	}
	due := r.record.Due
	var in credential.Input = credential.Tick{Worker: r.name}
	for {
		if _, ok := in.(credential.Tick); ok {
			if r.Blocked(r.record) {
				return nil // the order rings for itself
			}
			waited, err := r.await(ctx)
			if err != nil {
				return err
			}
			if waited {
				if err := r.load(steady, id); err != nil {
					return err
				}
				continue
			}
		}
		effect, went, err := r.advance(steady, in)
		switch {
		case err != nil:
			return err
		case went == nowhere:
			return nil
		case went == back: // somebody else committed: the same input, or a fresh look
			if in, err = r.afterReload(steady, in); err != nil {
				return err
			}
			continue
		case effect.Phase == "":
			if !r.more() {
				return nil
			}
			in = credential.Tick{Worker: r.name}
			continue
		}
		if r.Blocked(r.record) { // an order came in since the claim: it overtakes it
			return nil
		}
		out, err := r.step(steady, effect, due)
		if err != nil {
			return err
		}
		due = time.Time{}
		out.Last = ctx.Err() != nil || r.stopped()
		in = out
	}
}

// earlyWait is how much earlier than the due instant a doorbell may come (two clocks) and still be waited for.
const earlyWait = 2 * time.Second

// pauseLook is how often a doorbell that came during a fleet-wide pause looks whether that is over.
const pauseLook = 500 * time.Millisecond

// await waits out a fleet-wide pause, and a doorbell that is slightly early. It reports whether it waited at all; then the record may
// have changed. The error is ctx's.
func (r *run) await(ctx context.Context) (bool, error) {
	wait := time.Duration(0)
	switch early := r.record.Due.Sub(r.Now()); {
	case r.Paused() && !r.record.Urgent() && r.record.Phase != credential.Idle:
		wait = pauseLook
	case !r.record.Due.IsZero() && early > 0 && early <= earlyWait:
		wait = early
	}
	if wait == 0 || ctx.Err() != nil {
		return false, ctx.Err()
	}
	select {
	case <-ctx.Done():
		return true, ctx.Err()
	case <-time.After(wait):
		return true, nil
	}
}

// stopped reports whether a pause or an order on its way forbids to start a step.
func (r *run) stopped() bool {
	if r.Blocked(r.record) {
		return true
	}
	return r.Paused() && !r.record.Urgent()
}

// more reports whether another tick would find something to do now.
func (r *run) more() bool {
	rec := r.record
	return rec.Claim == nil && rec.Phase != credential.Idle && !rec.Due.IsZero() && !rec.Due.After(r.Now())
}

// afterReload keeps an outcome that still fits the reloaded record, and otherwise looks afresh. A version that was minted for an
// outcome that nobody takes any more, because an emergency or another worker came between, would be an orphan: it is removed.
func (r *run) afterReload(ctx context.Context, in credential.Input) (credential.Input, error) {
	o, ok := in.(credential.Outcome)
	if !ok {
		return in, nil
	}
	if c := r.record.Claim; c != nil && c.Worker == r.name && c.Phase == o.Phase {
		return o, nil
	}
	if o.Phase == credential.Minting && o.Version != "" && !r.knows(o.Version) {
		if err := r.removeStray(ctx, o.Version); err != nil {
			return nil, err
		}
	}
	return credential.Tick{Worker: r.name}, nil
}

func (r *run) load(ctx context.Context, id credential.ID) error {
	rec, seq, err := r.Ledger.Get(ctx, id)
	if err != nil {
		return fmt.Errorf("load record: %w", err)
	}
	r.record, r.seq = rec, seq
	return nil
}

// progress is how far one call of advance came.
type progress int

const (
	nowhere progress = iota // the record has nothing to do, or refuses the input
	forward                 // committed
	back                    // another commit came first: the record was reloaded
)

// advance asks Next and commits what it says.
func (r *run) advance(ctx context.Context, in credential.Input) (credential.Effect, progress, error) {
	next, effect, err := credential.Next(r.record, in, r.Now())
	switch {
	case errors.Is(err, credential.ErrRefused), errors.Is(err, credential.ErrSchema):
		r.log.Debug("refused", "reason", err)
		return effect, nowhere, nil
	case err != nil:
		return effect, nowhere, err
	case next.Rev == r.record.Rev:
		return effect, nowhere, nil
	}
	seq, err := r.Ledger.Commit(ctx, next, r.seq)
	switch {
	case err == nil:
		r.record, r.seq = next, seq
		r.log.Debug("committed", "phase", string(next.Phase), "generation", next.Generation, "action", next.Entry.Action)
		return effect, forward, nil
	case errors.Is(err, credential.ErrStale), errors.Is(err, credential.ErrUncertain):
		if lerr := r.load(ctx, next.ID); lerr != nil {
			return effect, nowhere, lerr
		}
		if r.record.Rev == next.Rev && r.record.Entry.Hash == next.Entry.Hash { // the reply was lost, the commit was not
			return effect, forward, nil
		}
		if c, mine := r.record.Claim, next.Claim; c != nil && mine != nil && c.Worker == r.name && c.Phase == mine.Phase {
			return r.record.Effect(), forward, nil // an earlier try of this pass had a lost reply, and arrived late
		}
		return effect, back, nil
	default:
		return effect, nowhere, fmt.Errorf("commit: %w", err)
	}
}

func (r *run) close() {
	if r.rotator == nil {
		return
	}
	if err := r.rotator.Close(); err != nil {
		r.log.Warn("close rotator", "error", err)
	}
}
