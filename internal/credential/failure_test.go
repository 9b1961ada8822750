package credential

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

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
