package workers_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/integration/store/storetest"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger/simledger"
	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/rotators/rotatortest"
	"github.com/rekeyhq/rekey/scheduler"
	"github.com/rekeyhq/rekey/workers"
)

const id = credential.ID("shop/orders")

// issuer is a fake issuer: its rotator, and the truth past all faults.
type issuer interface {
	rotators.Rotator
	Census() []rotators.VersionInfo
}

// world is a whole engine on simulated parts: one scheduler, two workers, one credential, and a consumer that logs in with
// whatever the store says, all the time.
type world struct {
	t      *testing.T
	ledger *simledger.Ledger
	store  *storetest.Memory
	issuer issuer
	faults *faults
	spec   credential.Spec
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// strict: no login with the store's current secret may fail.
	mu      sync.Mutex
	strict  bool
	logins  int
	refused []string
}

type kindOf struct {
	name string
	plan credential.Plan
	make func() issuer
	// exclusive is what the target is declared as.
	exclusive bool
}

func kinds() []kindOf {
	minted := func(tagged bool) func() issuer {
		return func() issuer {
			return rotatortest.NewFakeMinted(rotatortest.MintedConfig{Credential: string(id), Tagged: tagged, Seed: "s"})
		}
	}
	return []kindOf{
		{"overlap", credential.Overlapping, func() issuer {
			return rotatortest.NewFakeSlots(rotatortest.SlotsConfig{Credential: string(id)})
		}, false},
		{"minted-tagged", credential.Minted, minted(true), false},
		{"minted-exclusive", credential.Minted, minted(false), true},
		{"in-place", credential.InPlace, func() issuer {
			return rotatortest.NewFakeSlots(rotatortest.SlotsConfig{Credential: string(id), Slots: []rotators.VersionID{"only"}})
		}, false},
	}
}

func newWorld(t *testing.T, k kindOf) *world {
	w := &world{t: t, ledger: simledger.New(simledger.Config{}), store: &storetest.Memory{}, issuer: k.make(), faults: &faults{}}
	w.faults.after = w.login
	w.spec = credential.Spec{
		Target: "db", Kind: "fake", Store: "default", Owner: "shop", Environment: "test", Purpose: "tests",
		Overlap:  credential.Overlap{Min: credential.Duration(10 * time.Minute), Max: credential.Duration(20 * time.Minute)},
		AllowGap: k.plan == credential.InPlace, Exclusive: k.exclusive,
		StepDeadline: credential.Duration(30 * time.Second), Traits: w.issuer.Traits(),
	}
	return w
}

// start declares the credential and runs the engine until stop.
func (w *world) start() {
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	target := credential.Target{Name: "db", Kind: "fake", Environment: "test", Owner: "shop", Concurrency: 4}
	w.must2(w.ledger.PutTarget(ctx, target, 0))
	w.must(w.ledger.EnsureLanes(ctx, "db", 4))
	r, err := credential.New(id, w.ledger.Incarnation(), w.spec, "test", time.Now())
	w.must(err)
	w.must2(w.ledger.Commit(ctx, r, 0))
	run := func(f func(context.Context) error) {
		w.wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				w.t.Errorf("the engine stopped: %v", err)
			}
		})
	}
	for n := range 2 {
		guard := &workers.Guard{}
		worker := workers.New(workers.Config{
			Name: fmt.Sprintf("w%d", n), Ledger: faultyLedger{w.ledger, w.faults},
			Rotator: func(context.Context, credential.Target, credential.Record) (rotators.Rotator, error) {
				return w.rotator(), nil
			},
			Store:   func(string) (store.Store, error) { return faultyStore{w.store, w.faults}, nil },
			Blocked: guard.Blocked, Paused: guard.Paused, Random: rand.NewChaCha8([32]byte{1}),
		})
		run(func(ctx context.Context) error { return guard.Watch(ctx, w.ledger, nil) })
		run(func(ctx context.Context) error { return worker.Serve(ctx, w.ledger) })
	}
	s := scheduler.New(scheduler.Config{Ledger: w.ledger})
	run(s.Run)
	run(w.consume)
}

func (w *world) stop() {
	w.cancel()
	w.wg.Wait()
}

func (w *world) rotator() rotators.Rotator {
	f := faultyRotator{w.issuer, w.faults}
	if c, ok := w.issuer.(rotators.Composer); ok {
		return faultyComposer{f, c}
	}
	return f
}

// consume logs in with whatever the store says, from time to time; login also runs after each operation of a worker.
func (w *world) consume(ctx context.Context) error {
	tick := time.NewTicker(30 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			w.login()
		}
	}
}

func (w *world) login() {
	w.mu.Lock()
	defer w.mu.Unlock()
	current := w.store.Slots(string(id)).Current
	if current == nil {
		return
	}
	v, err := w.issuer.Prove(context.Background(), rotators.Op{}, current.Key.Version, current.Material)
	w.logins++
	if w.strict && v != rotators.Accepted {
		w.refused = append(w.refused, fmt.Sprintf("generation %d: %s %v", current.Key.Generation, v, err))
	}
}

func (w *world) setStrict(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.strict = on
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) must2(_ uint64, err error) { w.t.Helper(); w.must(err) }

func (w *world) record() credential.Record {
	r, _, err := w.ledger.Get(context.Background(), id)
	w.must(err)
	return r
}

// request commits what an operator asks for, as the API does.
func (w *world) request(v credential.Verb) {
	w.t.Helper()
	ctx := context.Background()
	if v == credential.Kill || v == credential.Replace {
		inc := credential.Incident{ID: "inc-" + string(v), Mode: string(v), Credentials: []credential.ID{id}, Actor: "test"}
		inc.Hash = inc.Sum()
		_, _, err := w.ledger.CreateIncident(ctx, inc)
		w.must(err)
		return
	}
	for {
		r, seq, err := w.ledger.Get(ctx, id)
		w.must(err)
		next, _, err := credential.Next(r, credential.Request{Verb: v, Actor: "test"}, time.Now())
		w.must(err)
		if next.Rev == r.Rev {
			return
		}
		_, err = w.ledger.Commit(ctx, next, seq)
		if errors.Is(err, credential.ErrStale) {
			continue
		}
		w.must(err)
		return
	}
}

// until waits, in the bubble's time, for a condition.
func (w *world) until(what string, ok func(credential.Record) bool) credential.Record {
	w.t.Helper()
	for range 6 * 720 {
		if r := w.record(); ok(r) {
			return r
		}
		time.Sleep(5 * time.Second)
	}
	r := w.record()
	w.t.Fatalf("six hours passed, never %s: phase %s generation %d parked %+v failure %+v due %s now %s claim %+v",
		what, r.Phase, r.Generation, r.Parked, r.Failure, r.Due, time.Now(), r.Claim)
	return r
}

// atRest: nothing is in flight and nothing is due.
func atRest(p credential.Phase) func(credential.Record) bool {
	return func(r credential.Record) bool {
		return r.Phase == p && r.Claim == nil && (r.Due.IsZero() || p == credential.Draining) && r.Parked == nil
	}
}

// observe is everything that can be seen.
func (w *world) observe() credential.Observation {
	o := w.ledger.Observe()
	o.Census = map[credential.ID][]rotators.VersionInfo{id: w.issuer.Census()}
	slots := w.store.Slots(string(id))
	stored, verdicts := map[string]credential.Published{}, map[string]rotators.Verdict{}
	for stage, s := range map[string]*store.Secret{"current": slots.Current, "pending": slots.Pending, "previous": slots.Previous} {
		if s == nil {
			continue
		}
		stored[stage] = credential.Published{Generation: s.Key.Generation, OpID: s.Key.OpID, Version: s.Key.Version}
		verdicts[stage], _ = w.issuer.Prove(context.Background(), rotators.Op{}, s.Key.Version, s.Material)
	}
	o.Stored = map[credential.ID]map[string]credential.Published{id: stored}
	o.Verdicts = map[credential.ID]map[string]rotators.Verdict{id: verdicts}
	return o
}

func (w *world) audit() {
	w.t.Helper()
	for _, v := range credential.Audit(w.observe()) {
		w.t.Errorf("%s", v)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.refused) > 0 {
		w.t.Errorf("%d of %d logins failed, the first: %s", len(w.refused), w.logins, w.refused[0])
	}
	if w.logins == 0 {
		w.t.Error("nobody logged in")
	}
}

// A fault is what happens at one operation of a worker: a commit, a call to the store or to the issuer.
type fault string

const (
	none        fault = ""
	dieBefore   fault = "die before"
	dieAfter    fault = "die after"
	loseRequest fault = "request lost" // class Transient, nothing happened
	loseReply   fault = "reply lost"   // class Unsure, it happened
	late        fault = "late"         // class Unsure, it happens ten minutes later
	freeze      fault = "freeze"       // the worker stands still for ten minutes and then goes on
)

// lateness is longer than any claim, and than the overlap, so that a frozen worker wakes in another phase.
const lateness = 25 * time.Minute

// faults counts the operations and strikes at one of them.
type faults struct {
	mu    sync.Mutex
	armed bool
	count int
	at    int    // the operation to strike, from 1; 0 for none
	match string // or the first of this name
	what  fault
	names []string
	late  sync.WaitGroup
	after func() // whenever an operation has happened
}

func (f *faults) arm(at int, what fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.armed, f.count, f.at, f.what, f.names = true, 0, at, what, nil
}

func (f *faults) next(name string) fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.armed {
		return none
	}
	f.count++
	f.names = append(f.names, name)
	if f.count == f.at {
		return f.what
	}
	if f.match != "" && f.match == name {
		f.match = ""
		return f.what
	}
	return none
}

// around performs one operation with what fate has for it.
func (f *faults) around(ctx context.Context, name string, lost, unsure error, do func(context.Context) error) error {
	perform := do
	do = func(ctx context.Context) error {
		err := perform(ctx)
		f.after()
		return err
	}
	switch f.next(name) {
	case dieBefore:
		runtime.Goexit()
	case dieAfter:
		_ = do(ctx)
		runtime.Goexit()
	case loseRequest:
		return lost
	case loseReply:
		if err := do(ctx); err != nil {
			return err
		}
		return unsure
	case late:
		steady := context.WithoutCancel(ctx)
		f.late.Go(func() {
			time.Sleep(lateness)
			_ = do(steady)
		})
		return unsure
	case freeze:
		time.Sleep(lateness)
		return do(context.WithoutCancel(ctx))
	}
	return do(ctx)
}

type faultyLedger struct {
	*simledger.Ledger
	f *faults
}

func (l faultyLedger) Commit(ctx context.Context, r credential.Record, seq uint64) (next uint64, err error) {
	err = l.f.around(ctx, "commit "+r.Entry.Action, credential.ErrUncertain, credential.ErrUncertain, func(ctx context.Context) error {
		var err error
		next, err = l.Ledger.Commit(ctx, r, seq)
		return err
	})
	return next, err
}

type faultyRotator struct {
	rotators.Rotator
	f *faults
}

func (r faultyRotator) Close() error { return nil }

func (r faultyRotator) around(ctx context.Context, name string, do func(context.Context) error) error {
	return r.f.around(ctx, name, rotators.Faultf(rotators.Transient, name, "request lost"), rotators.Faultf(rotators.Unsure, name, "reply lost"), do)
}

func (r faultyRotator) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (v rotators.Version, err error) {
	err = r.around(ctx, "apply", func(ctx context.Context) error {
		var err error
		v, err = r.Rotator.Apply(ctx, op, m)
		return err
	})
	return v, err
}

func (r faultyRotator) Prove(ctx context.Context, op rotators.Op, v rotators.VersionID, m rotators.Material) (verdict rotators.Verdict, err error) {
	err = r.around(ctx, "prove", func(ctx context.Context) error {
		var err error
		verdict, err = r.Rotator.Prove(ctx, op, v, m)
		return err
	})
	if err != nil {
		return rotators.Unknown, err
	}
	return verdict, nil
}

func (r faultyRotator) Disable(ctx context.Context, op rotators.Op, v rotators.VersionID) error {
	return r.around(ctx, "disable", func(ctx context.Context) error { return r.Rotator.Disable(ctx, op, v) })
}

func (r faultyRotator) Delete(ctx context.Context, op rotators.Op, v rotators.VersionID) error {
	return r.around(ctx, "delete", func(ctx context.Context) error { return r.Rotator.Delete(ctx, op, v) })
}

func (r faultyRotator) Inspect(ctx context.Context) (census []rotators.VersionInfo, err error) {
	err = r.around(ctx, "inspect", func(ctx context.Context) error {
		var err error
		census, err = r.Rotator.Inspect(ctx)
		return err
	})
	return census, err
}

type faultyComposer struct {
	faultyRotator
	rotators.Composer
}

type faultyStore struct {
	store.Store
	f *faults
}

func (s faultyStore) around(ctx context.Context, name string, do func(context.Context) error) error {
	return s.f.around(ctx, name, rotators.Faultf(rotators.Transient, name, "request lost"), rotators.Faultf(rotators.Unsure, name, "reply lost"), do)
}

func (s faultyStore) Stage(ctx context.Context, n store.Secret) (held store.Secret, err error) {
	err = s.around(ctx, "stage", func(ctx context.Context) error {
		var err error
		held, err = s.Store.Stage(ctx, n)
		return err
	})
	return held, err
}

func (s faultyStore) Promote(ctx context.Context, to, from store.Key) error {
	return s.around(ctx, "promote", func(ctx context.Context) error { return s.Store.Promote(ctx, to, from) })
}

func (s faultyStore) Get(ctx context.Context, c string, stage store.Stage) (got store.Secret, err error) {
	err = s.around(ctx, "get "+string(stage), func(ctx context.Context) error {
		var err error
		got, err = s.Store.Get(ctx, c, stage)
		return err
	})
	return got, err
}

func (s faultyStore) Discard(ctx context.Context, k store.Key) error {
	return s.around(ctx, "discard", func(ctx context.Context) error { return s.Store.Discard(ctx, k) })
}

func (s faultyStore) Destroy(ctx context.Context, k store.Key) error {
	return s.around(ctx, "destroy", func(ctx context.Context) error { return s.Store.Destroy(ctx, k) })
}

func inBubble(t *testing.T, k kindOf, f func(w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, k)
		w.start()
		defer func() {
			w.stop()
			w.faults.late.Wait()
		}()
		f(w)
	})
}
