package credential

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

// ErrRefused is wrapped by every refusal of Next: the input does not fit the record. The record is unchanged.
var ErrRefused = errors.New("refused")

// Input is an Outcome, a Request, an Ack or a Tick.
type Input interface{ input() }

// Tick says that time has passed and a worker is ready to act.
type Tick struct{ Worker string }

// Outcome is what came of the effect that Worker had claimed.
type Outcome struct {
	Worker string
	Phase  Phase // the claimed phase
	Result Result
	// Version is the slot chosen (Staging), the id minted (Minting) or the orphan's id (Attributing).
	Version rotators.VersionID
	// Versions is the census before a mint (Noting), or everything that was disabled (Killing, SweepingKill).
	Versions []rotators.VersionID
	Foreign  []string // versions at the issuer that are not ours
	Detail   string   // for the audit entry
	// Class, Message and RetryAfter explain Failed and Unknown. Message must hold no secret.
	Class      rotators.Class
	Message    string
	RetryAfter time.Duration
	// Performed says that the effect of an in-place apply ended the old secret at this instant.
	Performed time.Time
	// Last leaves the next step unclaimed: the worker is stopping, or has been told to pause.
	Last bool
}

// Ack says that a consumer has loaded a generation.
type Ack struct {
	Consumer   string
	Generation uint64
}

func (Tick) input()    {}
func (Outcome) input() {}
func (Request) input() {}
func (Ack) input()     {}

// Effect is the one thing to do next. The zero value means: nothing, until the record's Due.
type Effect struct {
	Phase    Phase
	Op       rotators.Op
	Version  Version   // the subject: candidate or old
	Versions []Version // Killing, SweepingKill, ProvingKill, Clearing: all subjects
	// Deadline bounds the effect, retries included; the claim lasts longer by a third.
	Deadline time.Time
}

// Next decides. It performs nothing and reads no clock: it returns the record to commit, and the effect to perform once
// that commit has succeeded. An unchanged Rev means that there is nothing to commit. A pair of record and input
// outside the plan is refused with ErrRefused, and a record of a newer schema with ErrSchema.
func Next(r Record, in Input, now time.Time) (Record, Effect, error) {
	if r.Schema > Schema {
		return r, Effect{}, fmt.Errorf("%s: schema %d, this build knows %d: %w", r.ID, r.Schema, Schema, ErrSchema)
	}
	m := &machine{r: r.clone(), before: r, now: now.UTC()}
	var err error
	switch in := in.(type) {
	case Tick:
		err = m.tick(in)
	case Outcome:
		err = m.outcome(in)
	case Request:
		err = m.request(in)
	case Ack:
		err = m.ack(in)
	default:
		err = m.refuse("unknown input %T", in)
	}
	if err != nil {
		return r, Effect{}, err
	}
	if !m.changed {
		return r, Effect{}, nil
	}
	return m.finish(), m.effect, nil
}

// machine is one call of Next: the record being changed and what the commit will say.
type machine struct {
	r, before Record
	now       time.Time
	changed   bool
	actor     string
	action    string
	detail    string
	effect    Effect
}

// clone copies what Next may change in place.
func (r Record) clone() Record {
	copied := func(v *Version) *Version {
		if v == nil {
			return nil
		}
		c := *v
		return &c
	}
	r.Candidate, r.Current, r.Old = copied(r.Candidate), copied(r.Current), copied(r.Old)
	r.Dead, r.Noted, r.Foreign = slices.Clone(r.Dead), slices.Clone(r.Noted), slices.Clone(r.Foreign)
	r.Doubtful, r.Orders = slices.Clone(r.Doubtful), slices.Clone(r.Orders)
	if r.Acks != nil {
		acks := make(map[string]time.Time, len(r.Acks))
		for k, v := range r.Acks {
			acks[k] = v
		}
		r.Acks = acks
	}
	r.Announce = nil
	return r
}

func (m *machine) refuse(format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", m.r.ID, fmt.Sprintf(format, args...), ErrRefused)
}

// did marks the commit as changed and says by whom and what.
func (m *machine) did(actor, action, detail string) {
	m.changed, m.actor, m.action, m.detail = true, actor, action, detail
}

func (m *machine) announce(kind string, n Notice) {
	n.Type = kind
	if n.Generation == 0 {
		n.Generation = m.r.Generation
	}
	m.r.Announce = append(m.r.Announce, n)
}

// finish closes the commit: revision, audit entry, schedule.
func (m *machine) finish() Record {
	r := &m.r
	r.Schema = Schema
	r.Rev++
	e := Entry{
		Credential: r.ID, Rev: r.Rev, At: m.now, Actor: m.actor, Action: m.action,
		From: m.before.Phase, To: r.Phase, Generation: r.Generation, Epoch: r.Epoch, OpID: r.Op().ID,
		Detail: m.detail, Prev: m.before.Entry.Hash,
	}
	for _, n := range r.Announce {
		e.Announced = append(e.Announced, n.Type)
		if n.Type == NoticeRotated {
			e.ValidUntil = n.ValidUntil
		}
	}
	e.Hash = e.Sum()
	r.Entry = e
	r.Due = r.due(m.now)
	return *r
}

// enter moves to a phase and forgets what belonged to the one before.
func (m *machine) enter(p Phase) {
	if m.r.Phase != p {
		m.r.Since = m.now
	}
	m.r.Phase, m.r.Claim, m.r.Attempt, m.r.RetryAt = p, nil, 0, time.Time{}
}

// claim commits the intent to perform the current phase's effect.
func (m *machine) claim(worker string) {
	r := &m.r
	r.Claim = &Claim{Worker: worker, Phase: r.Phase, At: m.now, Until: m.now.Add(r.ClaimTime())}
	m.effect = r.Effect()
}

// Effect is what the record's claim is for; zero without one. A worker whose commit had an unknown outcome and that finds
// its own claim on reloading goes on with this.
func (r Record) Effect() Effect {
	if r.Claim == nil {
		return Effect{}
	}
	e := Effect{Phase: r.Phase, Op: r.Op(), Deadline: r.Claim.At.Add(r.Spec.StepDeadline.D())}
	switch r.Phase {
	case Killing, SweepingKill, ProvingKill, Clearing:
		e.Versions = slices.Clone(r.Dead)
	case Disabling, ProvingDead, Deleting:
		if r.Old != nil {
			e.Version = *r.Old
		}
	default:
		if r.Candidate != nil {
			e.Version = *r.Candidate
		}
	}
	return e
}

// ClaimTime is how long a claim lasts: the step's deadline and a third.
func (r Record) ClaimTime() time.Duration { return r.Spec.StepDeadline.D() * 4 / 3 }

// mayStart reports whether a step may start now, apart from its claim and its time.
func (r Record) mayStart() bool {
	if r.Parked != nil {
		return false
	}
	return !r.Paused || r.Urgent()
}

// Urgent reports whether an emergency drives the record, so that no pause holds it.
func (r Record) Urgent() bool { return r.Emergency != nil }

// tick lets time act: it ends overlaps, starts sweeps, and claims the phase's effect for a worker.
func (m *machine) tick(t Tick) error {
	r := &m.r
	m.overdue()
	if !r.mayStart() {
		return nil
	}
	if r.Claim != nil && m.now.Before(r.Claim.Until) {
		return nil // somebody is at it
	}
	switch {
	case r.Phase == Idle:
		return nil
	case r.Phase == Draining:
		return m.drain(t)
	case r.Phase == Suspended:
		if r.Swept || m.now.Before(r.RetryAt) {
			return nil
		}
		m.enter(SweepingKill)
	case m.now.Before(r.RetryAt):
		return nil
	case r.Phase == Admitted:
		to, _ := follow(r, began)
		m.enter(to)
	case r.Claim != nil:
		m.succeed()
	}
	m.claim(t.Worker)
	m.did(t.Worker, "intend "+string(r.Phase), "")
	return nil
}

// succeed takes over from a worker that died or froze: its claim has run out.
func (m *machine) succeed() {
	r := &m.r
	m.startGap(r.Claim.At)
	f := &Failure{Class: rotators.Unsure.String(), Phase: r.Phase, At: m.now, Message: "worker " + r.Claim.Worker + " did not finish the step in time"}
	if to, ok := follow(r, Unclear); ok {
		m.enter(to)
	} else {
		r.Attempt++
	}
	r.Failure = f
	m.complain()
}

// startGap notes since when an in-place credential may be without a working secret.
func (m *machine) startGap(at time.Time) {
	if m.r.Plan == InPlace && m.r.Phase == Applying && m.r.GapFrom.IsZero() {
		m.r.GapFrom = at
	}
}

// complain announces, once, that a step does not succeed although it is tried again and again.
func (m *machine) complain() {
	r := &m.r
	if r.Failure != nil && (r.Attempt == announceTry || r.Attempt == 0 && r.Bounced == announceTry) {
		m.announce(NoticeRotationFailed, Notice{Reason: "retrying", Message: r.Failure.Message})
	}
}

// overdue announces, once, that the current version is older than the calendar allows.
func (m *machine) overdue() {
	at := m.r.overdueAt()
	if at.IsZero() || m.now.Before(at) {
		return
	}
	m.r.Overdue = true
	n := Notice{Generation: m.r.Current.Generation, Message: "last rotated " + m.r.LastRotation.Format(time.RFC3339)}
	m.announce(NoticeOverdue, n)
	m.did("scheduler", "overdue", n.Message)
}

// drain ends the overlap when its time has come, or announces that it soon will.
func (m *machine) drain(t Tick) error {
	r := &m.r
	if r.Hold {
		return nil
	}
	if !m.now.Before(r.drainEnd()) {
		to, _ := follow(r, ended)
		m.enter(to)
		m.claim(t.Worker)
		m.did(t.Worker, "intend "+string(to), "overlap over")
		return nil
	}
	if !r.Ending && !m.now.Before(r.endingAt()) {
		r.Ending = true
		m.announce(NoticeOverlapEnding, Notice{ValidUntil: r.drainEnd(), Lagging: r.Lagging()})
		m.did(t.Worker, "overlap ending", "")
	}
	return nil
}

// ack notes that a consumer has loaded a generation. One for another generation than the current is ignored.
func (m *machine) ack(a Ack) error {
	r := &m.r
	known := slices.ContainsFunc(r.Spec.Consumers, func(c Consumer) bool { return c.Name == a.Consumer })
	if !known {
		return m.refuse("consumer %q is not declared", clip(a.Consumer))
	}
	if r.Current == nil || a.Generation != r.Current.Generation || r.Phase != Draining {
		return nil
	}
	if _, again := r.Acks[a.Consumer]; again {
		return nil
	}
	if r.Acks == nil {
		r.Acks = map[string]time.Time{}
	}
	r.Acks[a.Consumer] = m.now
	m.did("consumer "+a.Consumer, "acknowledge", fmt.Sprintf("generation %d", a.Generation))
	return nil
}
