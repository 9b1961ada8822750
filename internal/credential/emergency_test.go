package credential

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/rekeyhq/rekey/rotators"
)

func TestAnOldOrderIsNotTakenAgainAfterANewerOne(t *testing.T) {
	d := drive(t, Overlapping).rotate("a").feed(Request{Verb: Kill, Incident: "i1"}).tick().report(Done).report(Rejected)
	d.feed(Request{Verb: Restore}).tick().report(Done).carry("b").report(Done).want(Idle)
	d.feed(Request{Verb: Replace, Incident: "i2"}).carry("a").report(Done).report(Rejected).report(Done).report(Done).want(Idle)
	rev := d.r.Rev
	if d.feed(Request{Verb: Kill, Incident: "i1"}); d.r.Rev != rev {
		t.Errorf("killed again: %s", d.r.Phase)
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
