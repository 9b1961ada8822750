package credential

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
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

func TestCleanRotationOfEachPlan(t *testing.T) {
	for _, plan := range []Plan{Overlapping, Minted} {
		t.Run(string(plan), func(t *testing.T) {
			d := drive(t, plan).rotate("a").want(Idle)
			if got := announced(d.r); !slices.Equal(got, []string{NoticeRotated}) {
				t.Errorf("announced %v", got)
			}
			d.rotate("b").want(Draining)
			n := d.r.Announce[0]
			if !n.ValidUntil.Equal(d.now.Add(10 * time.Minute)) {
				t.Errorf("the event promises the old one until %s", n.ValidUntil)
			}
			if d.r.Current.ID != "b" || d.r.Old.ID != "a" || d.r.Previous.Generation != 1 {
				t.Errorf("current %+v old %+v previous %+v", d.r.Current, d.r.Old, d.r.Previous)
			}
			d.retire()
			if got := announced(d.r); !slices.Equal(got, []string{NoticeRevoked}) || d.r.Announce[0].Generation != 1 {
				t.Errorf("announced %+v", d.r.Announce)
			}
			if d.r.Old != nil || d.r.Previous.Generation != 0 || d.r.Current.Generation != 2 {
				t.Errorf("left over: %+v", d.r)
			}
		})
	}
	t.Run("in-place", func(t *testing.T) {
		d := drive(t, InPlace).rotate("a").want(Idle)
		d.feed(Request{Verb: Rotate}).tick().report(Done, version("a")).want(Applying)
		d.now = d.now.Add(3 * time.Second)
		d.report(Done, func(o *Outcome) { o.Performed = d.now.Add(-time.Second) }).report(Accepted).want(Promoting)
		d.now = d.now.Add(time.Second)
		d.report(Done).want(Destroying)
		if g := d.r.Announce[0].Gap.D(); g != 2*time.Second {
			t.Errorf("gap %s, want the 2 s from the apply to the promote", g)
		}
		d.report(Done).want(Idle)
	})
}

func TestRotationIsRefusedInsideTheOverlap(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").rotate("b").want(Draining)
	for _, v := range []Verb{Rotate, Admit} {
		r, _, err := Next(d.r, Request{Verb: v}, d.now)
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "overlap is open until") {
			t.Errorf("%s: %v", v, err)
		}
		if diff := cmp.Diff(d.r, r); diff != "" {
			t.Errorf("a refusal changed the record: %s", diff)
		}
	}
}

func TestOverlapEndsWithAcksOrAtItsMaximum(t *testing.T) {
	d := drive(t, Overlapping)
	d.r.Spec.Consumers = []Consumer{{Name: "app", Required: true}, {Name: "report"}}
	d.rotate("a").rotate("b").want(Draining)
	d.now = d.r.DrainMin
	d.tick().want(Draining)
	d.feed(Ack{Consumer: "app", Generation: 1}) // of the old generation: ignored
	if len(d.r.Acks) != 0 {
		t.Fatalf("acks %v", d.r.Acks)
	}
	if _, _, err := Next(d.r, Ack{Consumer: "stranger", Generation: 2}, d.now); !errors.Is(err, ErrRefused) {
		t.Errorf("an undeclared consumer acknowledged: %v", err)
	}
	lagging := d.r
	d.feed(Ack{Consumer: "app", Generation: 2}).tick().want(Disabling)

	d.r, d.now = lagging, lagging.DrainMax.Add(-time.Minute)
	d.tick().want(Draining)
	if !slices.Equal(announced(d.r), []string{NoticeOverlapEnding}) || !slices.Equal(d.r.Announce[0].Lagging, []string{"app"}) {
		t.Errorf("announced %+v", d.r.Announce)
	}
	d.now = lagging.DrainMax
	d.tick().want(Disabling)
}

func TestHoldKeepsTheOverlapOpen(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").rotate("b").feed(Request{Verb: Hold})
	if !d.r.dueStep(d.now).IsZero() {
		t.Errorf("due %s while held", d.r.Due)
	}
	d.now = d.now.Add(24 * time.Hour)
	d.tick().want(Draining)
	d.feed(Request{Verb: Resume}).tick().want(Disabling)
}

func TestRollbackIsANewGenerationOfTheOldSecret(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").rotate("b").feed(Request{Verb: Rollback}).want(Reverting)
	d.tick().report(Done).want(Proving).report(Accepted).want(Promoting).report(Done).want(Draining)
	if d.r.Generation != 3 || d.r.Current.ID != "a" || d.r.Current.Generation != 3 || d.r.Old.ID != "b" || d.r.Old.Generation != 2 {
		t.Fatalf("current %+v old %+v", d.r.Current, d.r.Old)
	}
	if d.r.Announce[0].Reason != "rollback" || d.r.Announce[0].ValidUntil.IsZero() {
		t.Errorf("announced %+v", d.r.Announce)
	}
	d.retire()
	if d.r.Current.ID != "a" {
		t.Errorf("current %+v", d.r.Current)
	}
}

func TestRollbackOfADeadSecretLeavesTheOverlapAsItWas(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").rotate("b")
	min := d.r.DrainMin
	d.feed(Request{Verb: Rollback}).tick().report(Done).want(Proving)
	for range proofTries - 1 {
		d.report(Rejected).want(Proving)
		d.now = d.r.RetryAt
		d.tick()
	}
	d.report(Rejected).want(Discarding).report(Done).want(Draining)
	if d.r.Current.ID != "b" || d.r.Old.ID != "a" || !d.r.DrainMin.Equal(min) || d.r.Failed != 0 {
		t.Errorf("%+v", d.r)
	}
}

func TestLostReplyOfApplyIsCheckedBeforeItIsRepeated(t *testing.T) {
	d := drive(t, Overlapping).feed(Request{Verb: Rotate}).tick().report(Done, version("a")).want(Applying)
	d.report(Failed, class(rotators.Unsure)).want(Checking)
	applied := d.r
	d.report(Accepted).want(Promoting)
	d.r = applied
	d.report(Rejected).want(Applying)
	if d.eff.Phase != Applying {
		t.Errorf("the first repeat waits until %s", d.r.RetryAt)
	}
	d.report(Failed, class(rotators.Unsure)).want(Checking).report(Rejected).want(Applying)
	if d.eff.Phase != "" || !d.r.RetryAt.After(d.now) {
		t.Error("the second repeat does not wait")
	}
}

func TestDeadWorkerIsSucceededWhenItsClaimRunsOut(t *testing.T) {
	d := drive(t, Overlapping).feed(Request{Verb: Rotate}).tick().report(Done, version("a")).want(Applying)
	before := d.r
	other := Tick{Worker: "other"}
	d.feed(other)
	if d.r.Rev != before.Rev {
		t.Fatal("a claimed step was taken over early")
	}
	d.now = before.Claim.Until
	if !before.Due.Equal(d.now) {
		t.Errorf("due %s, the claim runs out %s", before.Due, d.now)
	}
	d.feed(other).want(Checking)
	if _, _, err := Next(d.r, Outcome{Worker: "w", Phase: Applying, Result: Done}, d.now); !errors.Is(err, ErrRefused) {
		t.Errorf("the frozen worker's outcome was taken: %v", err)
	}
}

func TestLostMint(t *testing.T) {
	d := drive(t, Minted).feed(Request{Verb: Rotate}).tick().report(Done).want(Minting)
	d.report(Failed, class(rotators.Unsure)).want(Attributing)
	d.now = d.r.RetryAt
	d.tick()
	lost := d.r
	d.report(Found, version("orphan")).want(Withdrawing)
	if d.eff.Version.ID != "orphan" {
		t.Errorf("withdraws %+v", d.eff.Version)
	}
	d.report(Done).want(Discarding).report(Done).want(Idle)
	if wait := d.r.NextRotation.Sub(d.now); wait <= 0 || wait > redoBase || d.r.Failed != 1 || d.r.Denied != 0 {
		t.Errorf("next in %s, failed %d, denied %d: a crash is not the issuer's refusal, and not repeated without a pause", wait, d.r.Failed, d.r.Denied)
	}
	d.now = d.r.NextRotation
	d.feed(Request{Verb: Admit})
	if d.r.Generation != 2 {
		t.Errorf("generation %d: the lost one is not burnt", d.r.Generation)
	}
	d.r = lost
	d.report(Nothing).want(Minting)
	d.r = lost
	d.report(Ambiguous, func(o *Outcome) { o.Message = "two keys" })
	if d.r.Parked == nil || d.r.State() != "parked" {
		t.Errorf("not parked: %+v", d.r)
	}
}

func TestMintedSecretThatCannotBeStoredIsWithdrawn(t *testing.T) {
	d := drive(t, Minted).feed(Request{Verb: Rotate}).tick().report(Done).report(Done, version("k1")).want(Staging)
	d.report(Failed, class(rotators.Transient)).want(Withdrawing)
	if d.eff.Version.ID != "k1" || !slices.Contains(announced(d.r), NoticeRotationFailed) {
		t.Errorf("withdraws %+v, announces %v", d.eff.Version, announced(d.r))
	}
	d.report(Done).report(Done).want(Idle)
	if d.r.Parked != nil {
		t.Errorf("parked although the store was only away: %+v", d.r.Parked)
	}
	// A store that says no will say no to the next one too: one withdrawn version is enough.
	d.now = d.r.NextRotation
	d.feed(Request{Verb: Admit}).tick().report(Done).report(Done, version("k2")).want(Staging)
	d.report(Failed, class(rotators.Conflict)).want(Withdrawing).report(Done).report(Done).want(Idle)
	if d.r.Parked == nil {
		t.Error("not parked")
	}
}

// Whatever goes wrong again and again is announced, and slows down.
func TestNothingFailsQuietlyForEver(t *testing.T) {
	day := func(d *driver, step func()) (steps, events int) {
		end := d.now.Add(24 * time.Hour)
		for d.now.Before(end) {
			steps++
			if steps > 5000 {
				t.Fatalf("5000 steps by %s in phase %s", d.now, d.r.Phase)
			}
			if d.r.Claim == nil {
				d.now = maxTime(d.now, d.r.Due)
				if d.r.Phase == Idle {
					d.feed(Request{Verb: Admit, Reason: "retry"})
				} else {
					d.tick()
				}
			} else {
				step()
			}
			events += len(d.r.Announce)
		}
		return steps, events
	}
	check := func(t *testing.T, d *driver, events int) {
		t.Helper()
		if events == 0 {
			t.Error("a whole day without an event")
		}
		if s := d.r.State(); s == "ok" {
			t.Errorf("state %q after a day in vain", s)
		}
	}
	t.Run("in place, the new secret is refused", func(t *testing.T) {
		d := drive(t, InPlace).rotate("a").feed(Request{Verb: Rotate}).tick()
		_, events := day(d, func() {
			switch d.r.Phase {
			case Proving:
				d.report(Rejected)
			default:
				d.report(Done, version("a"))
			}
		})
		check(t, d, events)
	})
	t.Run("apply is never confirmed", func(t *testing.T) {
		d := drive(t, Overlapping).feed(Request{Verb: Rotate}).tick()
		_, events := day(d, func() {
			switch d.r.Phase {
			case Applying:
				d.report(Failed, class(rotators.Unsure))
			case Checking:
				d.report(Rejected)
			default:
				d.report(Done, version("a"))
			}
		})
		check(t, d, events)
	})
	t.Run("the old one still logs in", func(t *testing.T) {
		d := drive(t, Overlapping).rotate("a").rotate("b")
		d.now = d.r.DrainMin
		d.tick()
		_, events := day(d, func() {
			if d.r.Phase == ProvingDead {
				d.report(Accepted)
			} else {
				d.report(Done)
			}
		})
		check(t, d, events)
	})
	t.Run("every minted reply is lost", func(t *testing.T) {
		d := drive(t, Minted).feed(Request{Verb: Rotate}).tick()
		_, events := day(d, func() {
			switch d.r.Phase {
			case Minting:
				d.report(Failed, class(rotators.Unsure))
			case Attributing:
				d.report(Found, version("orphan"))
			default:
				d.report(Done)
			}
		})
		if events == 0 || d.r.Generation > 60 {
			t.Errorf("%d generations, %d events", d.r.Generation, events)
		}
	})
	t.Run("replace, every candidate is refused", func(t *testing.T) {
		d := drive(t, Overlapping).rotate("a").feed(Request{Verb: Replace, Incident: "i"})
		start := d.r.Generation
		end := d.now.Add(time.Hour)
		for steps := 0; d.now.Before(end) && steps < 20000; steps++ {
			switch {
			case d.r.Claim == nil:
				d.now = maxTime(d.now, d.r.Due)
				d.tick()
			case d.r.Phase == Proving:
				d.report(Rejected)
			default:
				d.report(Done, version("b"))
			}
		}
		if n := d.r.Generation - start; n > 250 {
			t.Errorf("%d generations in an hour", n)
		}
	})
	t.Run("the worker dies in the same step each time", func(t *testing.T) {
		d := drive(t, Overlapping).feed(Request{Verb: Rotate}).tick()
		_, events := day(d, func() { d.now = d.r.Claim.Until; d.tick() })
		check(t, d, events)
	})
}

func TestAdoptionCanBeCorrectedUntilItSucceeds(t *testing.T) {
	s := spec(Overlapping)
	s.Adopt = &Adopt{Version: "wrong", Material: map[string]string{"password": "env:X"}}
	r, err := New("shop/orders", incarnation, s, "test", start)
	if err != nil {
		t.Fatal(err)
	}
	d := &driver{t: t, r: r, now: start}
	d.tick().report(Rejected)
	if d.r.Parked == nil {
		t.Fatal("not parked")
	}
	right := s
	right.Adopt = &Adopt{Version: "a", Material: s.Adopt.Material}
	d.feed(Request{Verb: Declare, Spec: &right}).want(Adopting).tick()
	if d.eff.Version.ID != "a" || d.r.Adopted != "a" {
		t.Fatalf("adopts %+v", d.eff.Version)
	}
	d.report(Accepted).want(Idle)
	// Afterwards the configuration may forget or change it: what was taken over stays known.
	for _, adopt := range []*Adopt{nil, {Version: "b", Material: s.Adopt.Material}} {
		later := s
		later.Adopt = adopt
		d.feed(Request{Verb: Declare, Spec: &later})
		if d.r.Adopted != "a" || d.r.Spec.Adopt == nil || d.r.Spec.Adopt.Version != "a" {
			t.Errorf("adopted %q, spec %+v", d.r.Adopted, d.r.Spec.Adopt)
		}
	}
	// Given up instead, it begins like a new one, and does not stumble over what may have been published.
	d = &driver{t: t, r: r, now: start}
	d.tick().report(Rejected)
	none := s
	none.Adopt = nil
	d.feed(Request{Verb: Declare, Spec: &none}).want(Idle)
	if d.r.Candidate != nil || d.r.Adopted != "" || len(d.r.Doubtful) != 1 {
		t.Errorf("%+v", d.r)
	}
}

func TestAnOldOrderIsNotTakenAgainAfterANewerOne(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").feed(Request{Verb: Kill, Incident: "i1"}).tick().report(Done).report(Rejected)
	d.feed(Request{Verb: Restore}).tick().report(Done).carry("b").report(Done).want(Idle)
	d.feed(Request{Verb: Replace, Incident: "i2"}).carry("a").report(Done).report(Rejected).report(Done).report(Done).want(Idle)
	rev := d.r.Rev
	if d.feed(Request{Verb: Kill, Incident: "i1"}); d.r.Rev != rev {
		t.Errorf("killed again: %s", d.r.Phase)
	}
}

func TestRefusedCandidateIsWithdrawnAndThreeInARowPark(t *testing.T) {
	d := drive(t, Overlapping).rotate("a")
	for n := 1; n <= failedToPark; n++ {
		if n == 1 {
			d.feed(Request{Verb: Rotate})
		} else {
			d.now = d.r.NextRotation
			d.feed(Request{Verb: Admit, Reason: "retry"})
		}
		d.tick().report(Done, version("b")).report(Done).want(Proving)
		for range proofTries - 1 {
			d.report(Rejected).want(Proving)
			d.now = d.r.RetryAt
			d.tick()
		}
		d.report(Rejected).want(Withdrawing)
		if !slices.Contains(announced(d.r), NoticeRotationFailed) {
			t.Errorf("announced %v", announced(d.r))
		}
		d.report(Done).report(Done).want(Idle)
		if d.r.Current.ID != "a" {
			t.Fatalf("current %+v", d.r.Current)
		}
	}
	if d.r.Parked == nil || !d.r.dueStep(d.now).IsZero() {
		t.Fatalf("not parked after %d failures", d.r.Failed)
	}
	d.feed(Request{Verb: Resume})
	if d.r.Parked != nil || d.r.Due.IsZero() {
		t.Errorf("not resumed: %+v", d.r)
	}
}

func TestSettleTimeIsGiven(t *testing.T) {
	d := drive(t, Overlapping)
	d.r.Spec.Traits.Settle = Duration(10 * time.Minute).D()
	d.feed(Request{Verb: Rotate}).tick().report(Done, version("a")).report(Done).want(Proving)
	end := d.now.Add(10 * time.Minute)
	for d.r.Phase == Proving && d.now.Before(end.Add(time.Hour)) {
		d.report(Rejected)
		if d.r.Phase == Proving {
			d.now = d.r.RetryAt
			d.tick()
		}
	}
	d.want(Withdrawing)
	if d.now.Before(end) {
		t.Errorf("gave up at %s, the issuer asked for patience until %s", d.now, end)
	}
}

func TestFailuresAreRetriedForEverOrParked(t *testing.T) {
	d := drive(t, Overlapping).feed(Request{Verb: Rotate}).tick()
	for n := 1; n < 40; n++ {
		d.report(Failed, class(rotators.Transient)).want(Staging)
		if d.r.Due.IsZero() || d.r.RetryAt.Sub(d.now) > retryMost {
			t.Fatalf("try %d: due %s", n, d.r.Due)
		}
		if got := slices.Contains(announced(d.r), NoticeRotationFailed); got != (n == announceTry) {
			t.Errorf("try %d: announced %v", n, announced(d.r))
		}
		d.now = d.r.RetryAt
		d.tick()
	}
	for _, c := range []rotators.Class{rotators.Refused, rotators.Conflict} {
		p := *d
		p.report(Failed, class(c))
		if p.r.Parked == nil || p.r.Claim != nil || !slices.Contains(announced(p.r), NoticeRotationFailed) {
			t.Errorf("%s: %+v", c, p.r)
		}
		p.feed(Request{Verb: Resume}).tick().want(Staging)
		if p.eff.Phase != Staging {
			t.Errorf("%s: resume does not try again", c)
		}
	}
}

func TestPauseLetsNothingStart(t *testing.T) {
	d := drive(t, Overlapping).feed(Request{Verb: Rotate}).tick().want(Staging).feed(Request{Verb: Pause})
	d.report(Done, version("a")).want(Applying)
	if d.eff.Phase != "" || d.r.Claim != nil || !d.r.Due.IsZero() {
		t.Fatalf("the next step began: %+v", d.eff)
	}
	rev := d.r.Rev
	d.now = d.now.Add(time.Hour)
	if d.tick(); d.r.Rev != rev {
		t.Error("a tick acted on a paused record")
	}
	d.feed(Request{Verb: Kill, Incident: "i1"}).tick()
	if d.eff.Phase != Killing {
		t.Errorf("a pause held up a kill: %+v", d.eff)
	}
}

func TestStoppingWorkerLeavesTheNextStepUnclaimed(t *testing.T) {
	d := drive(t, Overlapping).feed(Request{Verb: Rotate}).tick()
	d.report(Done, version("a"), func(o *Outcome) { o.Last = true }).want(Applying)
	if d.r.Claim != nil || d.eff.Phase != "" || !d.r.Due.Equal(d.now) {
		t.Errorf("claim %+v due %s", d.r.Claim, d.r.Due)
	}
}

func TestKillAndRestore(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").rotate("b").want(Draining)
	d.feed(Request{Verb: Kill, Incident: "i1", Reason: "leak"}).want(Killing)
	if d.r.Epoch != 1 || d.r.Lane() != LaneRevoke {
		t.Errorf("epoch %d lane %s", d.r.Epoch, d.r.Lane())
	}
	rev := d.r.Rev
	if d.feed(Request{Verb: Kill, Incident: "i1"}); d.r.Rev != rev {
		t.Error("the same order twice raised the epoch twice")
	}
	d.tick()
	if ids := []rotators.VersionID{d.eff.Versions[0].ID, d.eff.Versions[1].ID}; !slices.Equal(ids, []rotators.VersionID{"b", "a"}) {
		t.Errorf("kills %v", ids)
	}
	d.report(Done).want(ProvingKill)
	if d.r.Announce[0].Grade != "disabled" {
		t.Errorf("announced %+v", d.r.Announce)
	}
	d.report(Rejected).want(Suspended)
	if d.r.Announce[0].Grade != "proven" || !d.r.Proven {
		t.Errorf("announced %+v", d.r.Announce)
	}
	d.now = d.r.Due
	d.tick().want(SweepingKill).report(Done).want(Suspended)
	if !d.r.Due.IsZero() {
		t.Errorf("due %s after the second sweep", d.r.Due)
	}
	d.feed(Request{Verb: Restore}).want(Clearing).tick()
	if len(d.eff.Versions) != 2 || d.eff.Op.Generation != 2 {
		t.Errorf("clears %+v with the op of generation %d", d.eff.Versions, d.eff.Op.Generation)
	}
	d.report(Done).want(Admitted).carry("a").want(Destroying)
	if d.r.Old != nil || d.r.Current.Generation != 3 || d.r.Announce[0].Reason != "restore" {
		t.Errorf("restored: %+v", d.r.Current)
	}
	d.report(Done).want(Idle)
}

func TestNothingIsOkUntilARestoreIsPromoted(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").feed(Request{Verb: Kill, Incident: "i1"}).tick()
	if _, _, err := Next(d.r, Request{Verb: Restore}, d.now); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "still being carried out") {
		t.Errorf("%v", err)
	}
	d.report(Done).report(Rejected).feed(Request{Verb: Restore})
	for d.r.Current == nil {
		if s := d.r.State(); s != "restoring" {
			t.Fatalf("state %q in phase %s", s, d.r.Phase)
		}
		switch d.r.Phase {
		case Clearing, Admitted:
			if d.eff.Phase == "" {
				d.tick()
				continue
			}
		case Proving:
			d.report(Accepted)
			continue
		}
		d.report(Done, version("b"))
	}
	if s := d.r.State(); s != "ok" || !slices.Contains(States(), s) {
		t.Errorf("state %q", s)
	}
}

func TestKillIsRetriedForEverAndNeverParks(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").feed(Request{Verb: Kill, Incident: "i1"}).tick()
	for range 30 {
		d.report(Failed, class(rotators.Refused)).want(Killing)
		if d.r.Parked != nil || d.r.Due.IsZero() || d.r.RetryAt.Sub(d.now) > urgentMost {
			t.Fatalf("parked %v, due %s", d.r.Parked, d.r.Due)
		}
		d.now = d.r.RetryAt
		d.tick()
	}
}

func TestKillThatCannotBeProvenSaysSo(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").feed(Request{Verb: Kill, Incident: "i1"}).tick().report(Done).want(ProvingKill)
	for d.r.Phase == ProvingKill {
		d.report(Unknown, func(o *Outcome) { o.Message = "issuer is down" })
		if d.r.Phase == ProvingKill {
			d.now = d.r.RetryAt
			d.tick()
		}
	}
	d.want(Suspended)
	if d.r.Proven || !strings.Contains(d.r.Residue, "issuer is down") {
		t.Errorf("proven %v, residue %q", d.r.Proven, d.r.Residue)
	}
}

// An emergency at every phase: kill must always be taken and end suspended; replace must end idle with a generation of the new epoch, or be
// refused with a reason.
func TestEmergencyAtEveryPhase(t *testing.T) {
	for _, plan := range []Plan{Overlapping, Minted, InPlace} {
		for phase, at := range everyPhase(t, plan) {
			t.Run(fmt.Sprintf("%s/%s/kill", plan, phase), func(t *testing.T) {
				d := at
				d.t = t
				d.feed(Request{Verb: Kill, Incident: "k"}).want(Killing)
				settleDown(&d, Suspended)
				if d.r.Current != nil || d.r.Candidate != nil || d.r.Old != nil {
					t.Errorf("alive: %+v", d.r)
				}
			})
			t.Run(fmt.Sprintf("%s/%s/replace", plan, phase), func(t *testing.T) {
				d := at
				d.t = t
				r, _, err := Next(d.r, Request{Verb: Replace, Incident: "r"}, d.now)
				switch phase {
				case Adopting, Killing, ProvingKill, Suspended, SweepingKill, Clearing:
					if !errors.Is(err, ErrRefused) {
						t.Errorf("taken: %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				d.r = r
				settleDown(&d, Idle)
				if d.r.Current == nil || d.r.Current.Epoch != d.r.Epoch || d.r.Epoch == 0 || d.r.Emergency != nil || d.r.Old != nil {
					t.Errorf("current %+v old %+v epoch %d emergency %+v", d.r.Current, d.r.Old, d.r.Epoch, d.r.Emergency)
				}
			})
		}
	}
}

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

func TestNewerSchemaIsRefusedUntouched(t *testing.T) {
	r := fresh(t, Overlapping)
	r.Schema = Schema + 1
	got, _, err := Next(r, Tick{Worker: "w"}, start)
	if !errors.Is(err, ErrSchema) || !cmp.Equal(r, got) {
		t.Errorf("%v %s", err, cmp.Diff(r, got))
	}
}

func TestNextLeavesItsInputAlone(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").rotate("b")
	before := d.r.clone()
	before.Announce = d.r.Announce
	_, _, err := Next(d.r, Request{Verb: Kill, Incident: "x"}, d.now)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, d.r); diff != "" {
		t.Errorf("Next changed its argument: %s", diff)
	}
}

func TestOverdueIsAnnouncedOnce(t *testing.T) {
	d := drive(t, Overlapping).rotate("a")
	d.feed(Request{Verb: Pause})
	d.now = d.r.Due
	if d.now.IsZero() {
		t.Fatal("a paused credential is never looked at again")
	}
	d.tick()
	if !slices.Equal(announced(d.r), []string{NoticeOverdue}) {
		t.Errorf("announced %v", announced(d.r))
	}
	rev := d.r.Rev
	d.now = d.now.Add(time.Hour)
	if d.tick(); d.r.Rev != rev {
		t.Error("announced twice")
	}
}
