package credential

import (
	"flag"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var (
	start       = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	incarnation = uuid.MustParse("6f1c9f0e-6c5c-4f0e-9d11-0d6b8a1f7a11")
)

func spec(plan Plan) Spec {
	s := Spec{
		Target: "db", Kind: "fake", Store: "default", Owner: "team", Environment: "test", Purpose: "tests",
		Every: Duration(time.Hour), Overlap: Overlap{Min: Duration(10 * time.Minute), Max: Duration(20 * time.Minute)},
		StepDeadline: Duration(30 * time.Second),
		Traits:       rotators.Traits{MaxLive: 2, Countable: true, Kills: true},
	}
	switch plan {
	case Minted:
		s.Traits.Minted = true
	case InPlace:
		s.Traits.MaxLive, s.AllowGap = 1, true
	}
	return s
}

func fresh(t testing.TB, plan Plan) Record {
	t.Helper()
	r, err := New("shop/orders", incarnation, spec(plan), "test", start)
	if err != nil {
		t.Fatal(err)
	}
	if r.Plan != plan {
		t.Fatalf("plan %s, want %s", r.Plan, plan)
	}
	return r
}

// driver feeds a record and fails the test on a refusal.
type driver struct {
	t   testing.TB
	r   Record
	now time.Time
	eff Effect
	// seen collects the driver as it was in each phase, if set.
	seen map[Phase]driver
}

func (d *driver) feed(in Input) *driver {
	d.t.Helper()
	r, e, err := Next(d.r, in, d.now)
	if err != nil {
		d.t.Fatalf("phase %s, input %+v: %v", d.r.Phase, in, err)
	}
	d.r, d.eff = r, e
	if _, ok := d.seen[r.Phase]; !ok && d.seen != nil {
		at := *d
		at.seen = nil
		d.seen[r.Phase] = at
	}
	return d
}

func (d *driver) tick() *driver { d.t.Helper(); return d.feed(Tick{Worker: "w"}) }

func (d *driver) report(res Result, change ...func(*Outcome)) *driver {
	d.t.Helper()
	o := Outcome{Worker: "w", Phase: d.r.Phase, Result: res}
	for _, f := range change {
		f(&o)
	}
	return d.feed(o)
}

func (d *driver) want(p Phase) *driver {
	d.t.Helper()
	if d.r.Phase != p {
		d.t.Fatalf("phase %s, want %s", d.r.Phase, p)
	}
	return d
}

func version(id rotators.VersionID) func(*Outcome) { return func(o *Outcome) { o.Version = id } }

func class(c rotators.Class) func(*Outcome) {
	return func(o *Outcome) { o.Class, o.Message = c, "because" }
}

// rotate drives a whole clean rotation up to the open overlap (or idle where there is none).
func (d *driver) rotate(id rotators.VersionID) *driver {
	d.t.Helper()
	d.feed(Request{Verb: Rotate, Actor: "test"}).want(Admitted)
	return d.carry(id)
}

func (d *driver) carry(id rotators.VersionID) *driver {
	d.t.Helper()
	d.tick()
	if d.r.Plan == Minted {
		d.want(Noting).report(Done).want(Minting).report(Done, version(id)).want(Staging).report(Done)
	} else {
		d.want(Staging).report(Done, version(id)).want(Applying).report(Done)
	}
	return d.want(Proving).report(Accepted).want(Promoting).report(Done)
}

func (d *driver) retire() *driver {
	d.t.Helper()
	d.now = d.r.drainEnd()
	d.tick().want(Disabling).report(Done).want(ProvingDead).report(Rejected).want(Deleting).report(Done).want(Destroying).report(Done)
	return d.want(Idle)
}

func drive(t testing.TB, plan Plan) *driver {
	return &driver{t: t, r: fresh(t, plan), now: start}
}

func announced(r Record) []string {
	var kinds []string
	for _, n := range r.Announce {
		kinds = append(kinds, n.Type)
	}
	return kinds
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// settleDown lets everything succeed until the phase is reached and nothing is due.
func settleDown(d *driver, want Phase) {
	d.t.Helper()
	for range 100 {
		switch d.r.Phase {
		case want:
			if want != Suspended || d.r.Swept {
				return
			}
		case Idle:
			d.now = maxTime(d.now, d.r.NextRotation)
			d.feed(Request{Verb: Admit, Reason: "retry"})
			continue
		}
		if d.eff.Phase == "" || d.r.Claim == nil {
			d.now = maxTime(d.now, d.r.Due)
			d.tick()
			continue
		}
		res := Done
		var change []func(*Outcome)
		switch d.r.Phase {
		case Adopting, Checking, Proving:
			res = Accepted
		case ProvingDead, ProvingKill:
			res = Rejected
		case Attributing:
			res = Found
			change = append(change, version("orphan"))
		case Staging, Minting:
			id := rotators.VersionID("b")
			if d.r.Plan == InPlace || d.r.Current != nil && d.r.Current.ID == "b" {
				id = "a"
			}
			change = append(change, version(id))
		}
		d.report(res, change...)
	}
	d.t.Fatalf("never came to rest: phase %s, due %s, now %s, parked %+v", d.r.Phase, d.r.Due, d.now, d.r.Parked)
}
