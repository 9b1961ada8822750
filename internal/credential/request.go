package credential

import (
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
)

// Verb is what a request asks for.
type Verb string

const (
	Arm      Verb = "arm"      // scheduler: the next rotation is due at At
	Admit    Verb = "admit"    // scheduler: it is due now
	Rotate   Verb = "rotate"   // now, by hand
	Hold     Verb = "hold"     // keep the overlap open
	Rollback Verb = "rollback" // promote the previous secret again
	Pause    Verb = "pause"    // start no step
	Resume   Verb = "resume"   // undo pause, hold and park
	Kill     Verb = "kill"     // emergency: disable every version
	Replace  Verb = "replace"  // emergency: new version, then revoke the old at once
	Restore  Verb = "restore"  // after a kill: mint a new version
	Declare  Verb = "declare"  // apply: a changed Spec
	Release  Verb = "release"  // apply: no longer in the configuration
)

// Request is an order by Actor.
type Request struct {
	Verb   Verb
	Actor  string
	Reason string
	At     time.Time // Arm
	// Incident identifies a Kill or Replace: the same one twice changes nothing.
	Incident string
	Spec     *Spec // Declare
}

// New makes the first record of a credential: idle with nothing at the issuer, or about to adopt. It fails with what
// Spec.Validate finds.
func New(id ID, incarnation uuid.UUID, spec Spec, actor string, now time.Time) (Record, error) {
	if err := spec.Validate(); err != nil {
		return Record{}, fmt.Errorf("credential %s: %w", id, err)
	}
	plan, err := PlanFor(spec.Traits, spec.AllowGap)
	if err != nil {
		return Record{}, fmt.Errorf("credential %s: %w", id, err)
	}
	m := &machine{now: now.UTC(), r: Record{ID: id, Incarnation: incarnation, Spec: spec, Plan: plan, Managed: true}}
	m.did(actor, "declare", "new")
	if spec.Adopt != nil {
		m.begin("adopt")
		m.r.Candidate.ID, m.r.Adopted = spec.Adopt.Version, spec.Adopt.Version
		m.enter(Adopting)
	} else {
		m.enter(Idle)
		m.r.NextRotation = m.now
	}
	return m.finish(), nil
}

func (m *machine) request(q Request) error {
	switch q.Verb {
	case Arm, Admit, Rotate:
		return m.admission(q)
	case Kill:
		return m.kill(q)
	case Replace:
		return m.replace(q)
	case Declare:
		return m.declare(q)
	case Release:
		if m.r.Managed {
			m.r.Managed = false
			m.did(q.Actor, "release", "left the configuration; nothing is revoked")
		}
		return nil
	case Hold, Rollback, Pause, Resume, Restore:
		return m.steer(q)
	default:
		return m.refuse("unknown verb %q", q.Verb)
	}
}

// admission arms or begins a rotation. The overlap guard: only from idle.
func (m *machine) admission(q Request) error {
	r := &m.r
	switch {
	case !r.Managed:
		return m.refuse("it is not in the configuration any more: apply it again first")
	case r.Phase == Suspended || r.Phase.killing():
		return m.refuse("it was killed by incident %s (phase %s): restore it first", r.LastIncident(), r.Phase)
	case r.Parked != nil:
		return m.refuse("it is parked (%s): resume it first", r.Parked.Message)
	case r.Phase == Draining && r.Hold:
		return m.refuse("its overlap is held open: resume it first")
	case r.Phase == Draining:
		return m.refuse("its overlap is open until %s: rotating now would end the credential that applications still use", r.drainEnd().Format(time.RFC3339))
	case r.Phase != Idle:
		return m.refuse("generation %d is in flight (%s)", r.Generation, r.Phase)
	}
	if q.Verb == Arm {
		if q.At.IsZero() || q.At.Equal(r.NextRotation) {
			return nil
		}
		r.NextRotation = q.At.UTC()
		m.did(q.Actor, "arm", r.NextRotation.Format(time.RFC3339))
		return nil
	}
	if r.Paused {
		return m.refuse("it is paused: resume it first")
	}
	if q.Verb == Admit && (r.NextRotation.IsZero() || m.now.Before(r.NextRotation)) {
		return m.refuse("it is not due before %s", r.NextRotation.Format(time.RFC3339))
	}
	reason := q.Reason
	if reason == "" {
		reason = string(q.Verb)
	}
	m.did(q.Actor, "admit", reason)
	m.begin(reason)
	return nil
}

// steer handles what an operator asks for outside an emergency.
func (m *machine) steer(q Request) error {
	r := &m.r
	switch q.Verb {
	case Hold:
		if r.Phase != Draining {
			return m.refuse("there is no overlap to hold (phase %s)", r.Phase)
		}
		if r.Hold {
			return nil
		}
		r.Hold = true
	case Rollback:
		if r.Plan == InPlace {
			return m.refuse("an in-place plan has no previous version to go back to")
		}
		if r.Phase != Draining || r.Old == nil || r.Emergency != nil {
			return m.refuse("a rollback is possible only while the overlap is open (phase %s)", r.Phase)
		}
		old := *r.Old
		r.Generation++
		r.Candidate = &Version{ID: old.ID, Generation: r.Generation, Epoch: r.Epoch, OpID: r.Op().ID, CreatedAt: m.now, AppliedAt: old.AppliedAt, Revert: true}
		r.Reason = string(Rollback)
		to, _ := follow(r, rolledBack)
		m.enter(to)
	case Pause:
		if r.Paused {
			return nil
		}
		r.Paused = true
	case Resume:
		if !r.Paused && !r.Hold && r.Parked == nil {
			return m.refuse("it is neither paused, held nor parked (state %s)", r.State())
		}
		if r.Parked != nil {
			r.Failed, r.Denied, r.Attempt, r.RetryAt, r.Failure = 0, 0, 0, time.Time{}, nil
		}
		r.Paused, r.Hold, r.Parked = false, false, nil
	case Restore:
		if r.Phase.killing() {
			return m.refuse("the kill is still being carried out (phase %s): wait until it is suspended", r.Phase)
		}
		if r.Phase != Suspended {
			return m.refuse("it is not suspended (phase %s)", r.Phase)
		}
		if r.Spec.Traits.Unfenced && !r.Swept {
			return m.refuse("the issuer holds no fence, so the kill is confirmed only after its second sweep at %s", r.RetryAt.Format(time.RFC3339))
		}
		r.Emergency, r.Parked, r.Paused = nil, nil, false
		to, _ := follow(r, restored)
		m.enter(to)
	}
	m.did(q.Actor, string(q.Verb), q.Reason)
	return nil
}

// declare takes over a changed Spec. What is in flight keeps its place: target, store and plan change only when idle. The provider's
// fields may change at any time, or a wrong one could never be mended; who asks has checked that no version in use is lost by it.
func (m *machine) declare(q Request) error {
	r := &m.r
	if q.Spec == nil {
		return m.refuse("declare without a spec")
	}
	if err := q.Spec.Validate(); err != nil {
		return m.refuse("%v", err)
	}
	plan, err := PlanFor(q.Spec.Traits, q.Spec.AllowGap)
	if err != nil {
		return m.refuse("%v", err)
	}
	spec := *q.Spec
	now, was := &spec, &r.Spec
	moved := now.Target != was.Target || now.Kind != was.Kind || now.Store != was.Store || plan != r.Plan
	if moved && r.Phase != Idle && r.Phase != Adopting {
		return m.refuse("target, store and plan cannot change while it is in phase %s: try again when it is idle", r.Phase)
	}
	if err := m.adoption(now); err != nil {
		return err
	}
	if now.Every != was.Every || now.Jitter != was.Jitter {
		if r.Phase == Idle && r.Failed == 0 && r.Generation > 0 {
			r.NextRotation = time.Time{} // the scheduler arms it anew
		}
		r.Overdue = false
	}
	r.Spec, r.Plan, r.Managed = *now, plan, true
	m.did(q.Actor, "declare", "changed")
	return nil
}

// adoption takes over what a new spec says of it: corrections while it is still being tried, nothing afterwards. Taking over a
// version that was not proven to be the credential's own is possible only with its first record.
func (m *machine) adoption(now *Spec) error {
	r := &m.r
	if r.Phase != Adopting {
		now.Adopt = r.Spec.Adopt
		return nil
	}
	if r.Claim != nil && m.now.Before(r.Claim.Until) {
		return m.refuse("its adoption is being tried just now: try again in a moment")
	}
	r.Parked, r.Failure = nil, nil
	if now.Adopt != nil {
		r.Candidate.ID, r.Adopted = now.Adopt.Version, now.Adopt.Version
		m.enter(Adopting)
		return nil
	}
	r.Doubtful = append(r.Doubtful, published(*r.Candidate)) // a dead worker may have published it
	r.Candidate, r.Adopted = nil, ""
	m.enter(Idle)
	r.NextRotation = m.now
	return nil
}

// kill raises the epoch and takes every version out of service, whatever is in flight.
func (m *machine) kill(q Request) error {
	r := &m.r
	if q.Incident == "" {
		return m.refuse("an emergency needs an incident id")
	}
	if r.Ordered(q.Incident) {
		return nil
	}
	for _, v := range r.Live() {
		if !slices.ContainsFunc(r.Dead, func(d Version) bool { return d.ID == v.ID }) {
			r.Dead = append(r.Dead, v)
		}
	}
	if (r.Phase == Promoting || r.Phase == Adopting) && r.Candidate != nil {
		r.Doubtful = append(r.Doubtful, published(*r.Candidate))
	}
	m.order(q, ModeKill)
	r.Candidate, r.Current, r.Old = nil, nil, nil
	r.Swept = false
	r.NextRotation, r.GapFrom = time.Time{}, time.Time{}
	m.enter(Killing)
	m.did(q.Actor, "kill", q.Reason)
	return nil
}

// ordersKept is how many orders a record remembers. An order is marked as expanded once it has reached its records, and not
// carried to them again.
const ordersKept = 32

// order raises the epoch for an emergency and clears what would hold it up.
func (m *machine) order(q Request, mode string) {
	r := &m.r
	r.Epoch++
	r.Emergency = &Emergency{Mode: mode, Incident: q.Incident, Reason: q.Reason, Actor: q.Actor, At: m.now, Epoch: r.Epoch}
	r.Reason = mode
	if r.Orders = append(r.Orders, q.Incident); len(r.Orders) > ordersKept {
		r.Orders = r.Orders[len(r.Orders)-ordersKept:]
	}
	r.Parked, r.Hold, r.Failed, r.Denied, r.Failure, r.Bounced = nil, false, 0, 0, nil, 0
	r.Proven, r.Residue = false, ""
}

// replace raises the epoch, ends what is in flight, and goes for a new version; the old one gets no overlap.
func (m *machine) replace(q Request) error {
	r := &m.r
	if q.Incident == "" {
		return m.refuse("an emergency needs an incident id")
	}
	if r.Ordered(q.Incident) {
		return nil
	}
	switch {
	case r.Phase == Clearing:
		return m.refuse("it is being restored, which makes a new version")
	case r.Phase == Suspended || r.Phase.killing():
		return m.refuse("it was killed by incident %s (phase %s): restore it, which makes a new version", r.LastIncident(), r.Phase)
	case !r.Managed:
		return m.refuse("it is not in the configuration any more: apply it again, or kill it")
	case r.Phase == Adopting:
		return m.refuse("it is being adopted: nothing of ours is in use yet")
	}
	busyUntil := time.Time{}
	if r.Claim != nil {
		busyUntil = r.Claim.Until
	}
	m.order(q, ModeReplace)
	m.did(q.Actor, "replace", q.Reason)
	switch r.Phase {
	case Idle:
		m.begin(ModeReplace)
	case Admitted, Noting: // nothing was made yet: the same generation goes on at the new epoch
		r.Candidate.Epoch = r.Epoch
		m.enter(Admitted)
	case Minting, Attributing:
		m.enter(Attributing)
		r.RetryAt = busyUntil // whoever is minting will have ended by then
	case Draining:
		to, _ := follow(r, ended)
		m.enter(to)
	case Reverting:
		m.enter(Discarding)
	case Staging, Applying, Checking, Proving:
		m.abort()
	default: // promoting, or retiring: forward, under the new epoch
		m.enter(r.Phase)
	}
	return nil
}

// abort gives up a candidate that consumers do not read yet. An in-place one cannot be given up: its old secret is gone.
func (m *machine) abort() {
	r := &m.r
	switch {
	case r.Plan == InPlace:
		m.enter(r.Phase)
	case r.Candidate.Revert || r.Candidate.ID == "":
		m.enter(Discarding)
	default:
		m.enter(Withdrawing)
	}
}
