package credential

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rekeyhq/rekey/rotators"
)

// everyPhase gives a driver in each phase that the plan can reach, collected on scripted ways through the protocol.
func everyPhase(t testing.TB, plan Plan) map[Phase]driver {
	t.Helper()
	seen := map[Phase]driver{}
	begin := func() *driver {
		d := drive(t, plan)
		d.seen = seen
		d.rotate("a")
		for d.r.Phase != Idle {
			d.report(Done)
		}
		return d
	}
	// A clean rotation, a rollback, a retirement.
	d := begin().rotate("b")
	if plan != InPlace {
		d.feed(Request{Verb: Rollback}).tick().report(Done).report(Accepted).report(Done).retire()
	}
	// A kill and a restore.
	d = begin().feed(Request{Verb: Kill, Incident: "i0"}).tick().report(Done).report(Rejected)
	d.now = d.r.Due
	d.tick().report(Done).feed(Request{Verb: Restore}).tick()
	// What can go wrong before the promote.
	d = begin().feed(Request{Verb: Rotate}).tick()
	if plan == Minted {
		d.report(Done).report(Failed, class(rotators.Unsure))
		d.now = d.r.RetryAt
		d.tick().report(Found, version("b")).report(Done)
	} else {
		d.report(Done, version("b")).report(Failed, class(rotators.Unsure))
	}
	if plan == Overlapping {
		d.report(Rejected).report(Done)
		for d.r.Phase == Proving {
			d.report(Rejected)
			d.now = maxTime(d.now, d.r.RetryAt)
			if d.r.Phase == Proving {
				d.tick()
			}
		}
		d.want(Withdrawing).report(Done)
	}
	a := fresh(t, plan)
	s := a.Spec
	s.Adopt = &Adopt{Version: "a", Material: map[string]string{"password": "env:X"}}
	r, err := New("shop/orders", incarnation, s, "test", start)
	if err != nil {
		t.Fatal(err)
	}
	seen[Adopting] = driver{t: t, r: r, now: start}
	return seen
}

// wander makes one random legal or illegal input; illegal ones must be refused and change nothing.
func wander(d *driver, rng *rand.Rand) {
	verbs := []Verb{Rotate, Admit, Hold, Rollback, Pause, Resume, Resume, Kill, Replace, Restore, Arm}
	var in Input
	switch n := rng.IntN(20); {
	case n < 7:
		d.now = maxTime(d.now, d.r.Due)
		in = Tick{Worker: "w"}
	case n < 18:
		o := Outcome{Worker: "w", Phase: d.r.Phase, Result: results[rng.IntN(len(results))], Class: rotators.Class(rng.IntN(5))}
		if o.Version = rotators.VersionID([]string{"a", "b"}[rng.IntN(2)]); d.r.Current != nil && d.r.Current.ID == o.Version {
			o.Version = map[rotators.VersionID]rotators.VersionID{"a": "b", "b": "a"}[o.Version]
		}
		if d.r.Plan == InPlace {
			o.Version = "a"
		}
		in = o
	default:
		in = Request{Verb: verbs[rng.IntN(len(verbs))], Actor: "test", Incident: fmt.Sprint(rng.Uint64()), At: d.now.Add(time.Minute)}
	}
	before := d.r
	r, e, err := Next(d.r, in, d.now)
	if err != nil {
		if !errors.Is(err, ErrRefused) {
			d.t.Fatalf("%v", err)
		}
		if !reflect.DeepEqual(before, r) {
			d.t.Fatalf("a refusal changed the record: %s", cmp.Diff(before, r))
		}
		return
	}
	d.r, d.eff = r, e
}

var results = []Result{Done, Accepted, Rejected, Unknown, Unclear, Lost, Found, Nothing, Ambiguous, Failed}

// Whatever comes in whatever order: no panic, no silent stop, a gapless chain, never two slots for one version in use.
func TestRandomWalkKeepsTheRecordSound(t *testing.T) {
	seeds := 300
	if testing.Short() {
		seeds = 50
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(uint64(seed), 7))
		plan := []Plan{Overlapping, Minted, InPlace}[seed%3]
		d := drive(t, plan)
		entries := []Entry{d.r.Entry}
		for range 400 {
			rev := d.r.Rev
			wander(d, rng)
			if d.r.Rev == rev {
				continue
			}
			if d.r.Rev != rev+1 {
				t.Fatalf("seed %d: rev went from %d to %d", seed, rev, d.r.Rev)
			}
			entries = append(entries, d.r.Entry)
			sound(t, seed, d.r)
		}
		for _, v := range VerifyChain(entries, &d.r) {
			t.Fatalf("seed %d: %s", seed, v)
		}
	}
}

func sound(t *testing.T, seed int, r Record) {
	t.Helper()
	waits := r.Parked != nil || r.Paused && !r.Urgent() || r.Phase == Draining && r.Hold || r.Phase == Suspended && r.Swept
	if r.Due.IsZero() && !waits {
		t.Fatalf("seed %d: stopped quietly in %s: %+v", seed, r.Phase, r)
	}
	if r.Plan != InPlace && r.Current != nil && r.Old != nil && r.Current.ID == r.Old.ID {
		t.Fatalf("seed %d: old and current are both %s", seed, r.Current.ID)
	}
	if (r.Phase == Disabling || r.Phase == Deleting || r.Phase == ProvingDead) && r.Old == nil {
		t.Fatalf("seed %d: %s without an old version", seed, r.Phase)
	}
	if r.Phase.acts() && r.Claim != nil && r.Claim.Phase != r.Phase {
		t.Fatalf("seed %d: claim for %s in %s", seed, r.Claim.Phase, r.Phase)
	}
}

// Every pair of phase and result, for every plan: where it leads, or that it is refused. The golden file is the review.
func TestEveryPairOfPhaseAndResult(t *testing.T) {
	var b strings.Builder
	for _, plan := range []Plan{Overlapping, Minted, InPlace} {
		at := everyPhase(t, plan)
		for _, p := range Phases() {
			d, ok := at[p]
			if !ok {
				fmt.Fprintf(&b, "%s\t%s\tnot in this plan\n", plan, p)
				continue
			}
			if !p.acts() {
				fmt.Fprintf(&b, "%s\t%s\twaits\n", plan, p)
				continue
			}
			d.r.Parked, d.r.Paused, d.r.RetryAt, d.r.Claim = nil, false, time.Time{}, nil
			d.r.Attempt, d.r.Bounced = 0, 0
			d.r.Claim = &Claim{Worker: "w", Phase: p, At: d.now, Until: d.now.Add(time.Minute)}
			if d.r.Emergency != nil && !p.killing() {
				d.r.Emergency = nil
			}
			for _, res := range results {
				for _, c := range classes(res) {
					o := Outcome{Worker: "w", Phase: p, Result: res, Class: c, Message: "m", Version: "x"}
					r, _, err := Next(d.r, o, d.now)
					label := string(res)
					if res == Failed {
						label += " " + c.String()
					}
					fmt.Fprintf(&b, "%s\t%s\t%s\t%s\n", plan, p, label, ending(r, err))
				}
			}
		}
	}
	golden(t, "table.golden", b.String())
}

func classes(res Result) []rotators.Class {
	if res == Failed {
		return []rotators.Class{rotators.Unsure, rotators.Transient, rotators.Throttled, rotators.Conflict, rotators.Refused}
	}
	return []rotators.Class{rotators.Unsure}
}

func ending(r Record, err error) string {
	switch {
	case errors.Is(err, ErrRefused):
		return "refused"
	case err != nil:
		return err.Error()
	case r.Parked != nil:
		return string(r.Phase) + ", parked"
	case r.Attempt > 0:
		return string(r.Phase) + ", retry"
	}
	return string(r.Phase)
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs; review it and run with -update:\n%s", name, diff)
	}
}
