package credential

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

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
