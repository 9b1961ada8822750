package credential

import (
	"fmt"
	"slices"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

// outcome commits what came of a claimed effect, and at once the intent of the next one.
func (m *machine) outcome(o Outcome) error {
	r := &m.r
	if r.Claim == nil || r.Claim.Worker != o.Worker || r.Claim.Phase != o.Phase || r.Phase != o.Phase {
		return m.refuse("outcome of %q by worker %q, but the record is in %q and claimed by %q", o.Phase, o.Worker, r.Phase, claimant(r.Claim))
	}
	if o.Foreign != nil {
		r.Foreign = slices.Clone(o.Foreign)
	}
	on := o.Result
	switch {
	case on == Failed && r.Plan == Minted && r.Phase == Staging:
		on = Lost // the minted secret was held in memory until the deadline, and could not be stored
		if o.Class == rotators.Conflict || o.Class == rotators.Refused {
			r.Denied = failedToPark // another mint would fare no better: park once this one is withdrawn
		}
	case on == Failed && o.Class == rotators.Unsure:
		if _, ok := follow(r, Unclear); !ok {
			return m.retry(o)
		}
		on = Unclear
	case on == Failed && (o.Class == rotators.Conflict || o.Class == rotators.Refused) && !r.Phase.killing():
		m.park(o)
		return nil
	case on == Failed || on == Unknown:
		return m.retry(o)
	case on == Rejected && r.Phase == Proving && m.maySettle():
		return m.retry(o)
	case on == Ambiguous && r.Phase == Attributing, on == Rejected && r.Phase == Adopting:
		m.park(o)
		return nil
	}
	to, ok := follow(r, on)
	if !ok {
		return m.refuse("result %q is not possible in phase %q of plan %q", on, r.Phase, r.Plan)
	}
	m.move(o, on, to)
	return nil
}

func claimant(c *Claim) string {
	if c == nil {
		return ""
	}
	return c.Worker
}

// maySettle reports whether a refused candidate deserves another try: the issuer said that it may need time.
func (m *machine) maySettle() bool {
	r := &m.r
	if r.Attempt+1 < proofTries {
		return true
	}
	return r.Candidate != nil && m.now.Before(r.Candidate.AppliedAt.Add(r.Spec.Traits.Settle))
}

// move follows a rule of the table: it takes over what the outcome brought, enters the phase, and claims it if it acts.
func (m *machine) move(o Outcome, on Result, to Phase) {
	r := &m.r
	from, began := r.Phase, r.Claim.At
	m.did(o.Worker, string(on)+" "+string(from), o.Detail)
	if o.Message != "" && m.detail == "" {
		m.detail = o.Message
	}
	r.Failure = nil
	m.take(o, on, to, began)
	switch to {
	case Admitted:
		m.begin(m.againReason(from))
		if from == Discarding && r.Failed > 0 {
			r.RetryAt = m.now.Add(backoff(r.ID, r.Failed-1, retryBase, m.patience()))
		}
		return
	case Idle:
		m.settle(from)
		return
	}
	m.enter(to)
	switch {
	case bounces(from, to):
		r.Bounced++
		r.Failure = &Failure{Class: o.Class.String(), Phase: from, Message: said(o, on), At: m.now}
		m.complain()
		if r.Bounced > 1 {
			r.RetryAt = m.now.Add(backoff(r.ID, r.Bounced-2, retryBase, m.patience()))
		}
	case to == Promoting || to == Deleting || to == Suspended || to == Withdrawing || to == Draining:
		r.Bounced = 0
	}
	switch {
	case to == Suspended && !r.Swept:
		r.RetryAt = r.Emergency.At.Add(r.ClaimTime() + r.Spec.Traits.Settle)
	case to == Attributing:
		// What was sent may still be under way at the issuer: look only when it must have arrived.
		r.RetryAt = m.now.Add(retryBase + r.Spec.Traits.Settle)
	}
	if to.acts() && !m.now.Before(r.RetryAt) && r.mayStart() && !o.Last {
		m.claim(o.Worker)
	}
}

// bounces reports whether a check sends the record back to the step that it checked.
func bounces(from, to Phase) bool {
	switch [2]Phase{from, to} {
	case [2]Phase{Checking, Applying}, [2]Phase{Proving, Applying}, [2]Phase{ProvingDead, Disabling},
		[2]Phase{ProvingKill, Killing}, [2]Phase{Attributing, Minting}:
		return true
	}
	return false
}

// take carries what an outcome brought into the record, before the phase changes.
func (m *machine) take(o Outcome, on Result, to Phase, began time.Time) {
	r := &m.r
	switch r.Phase {
	case Adopting:
		r.Candidate.AppliedAt, r.Candidate.PromotedAt, r.LastRotation = m.now, m.now, m.now
		r.Current, r.Candidate = r.Candidate, nil
		r.Published = published(*r.Current)
	case Noting:
		r.Noted, r.NotedAt = slices.Clone(o.Versions), began
	case Minting:
		if on == Done {
			r.Candidate.ID, r.Candidate.AppliedAt = o.Version, m.now
		}
	case Attributing:
		if on == Found {
			m.gaveUp("a minted version was lost before it could be stored, and is withdrawn")
		}
		r.Candidate.ID = o.Version
		if on == Nothing && replacing(r) {
			r.Candidate.Epoch = r.Epoch // nothing was made before the emergency
		}
	case Staging, Reverting:
		if o.Version != "" {
			r.Candidate.ID = o.Version
		}
		switch {
		case on == Lost && r.Phase == Reverting:
			m.announce(NoticeRotationFailed, Notice{Reason: "rollback", Message: o.Message})
		case on == Lost:
			m.gaveUp(said(o, on))
		}
	case Applying:
		if on == Done {
			r.Candidate.AppliedAt = m.now
		}
		if !o.Performed.IsZero() {
			began = o.Performed
		}
		m.startGap(began)
	case Checking:
		if on == Accepted {
			r.Candidate.AppliedAt = m.now
		}
	case Proving:
		if on == Rejected && to != Applying {
			const message = "the issuer refused the new credential"
			if r.Candidate.Revert {
				m.announce(NoticeRotationFailed, Notice{Reason: r.Reason, Message: message})
				break
			}
			r.Denied++
			m.gaveUp(message)
		}
	case Promoting:
		m.promoted()
	case Discarding:
		r.Candidate, r.Noted, r.NotedAt = nil, nil, time.Time{}
	case ProvingDead:
		r.Proven, r.Residue = on == Rejected, residual(r.Spec.Traits)
		if on == Lost {
			r.Residue = o.Message
		}
	case Destroying:
		if r.Old != nil {
			m.announce(NoticeRevoked, Notice{Generation: r.Old.Generation, Reason: r.Reason})
		}
		r.Old, r.Previous, r.Doubtful = nil, Published{}, nil
	case Killing:
		m.disabled(o)
		if r.Bounced == 0 {
			m.announce(NoticeSuspended, Notice{Reason: r.Reason, Grade: "disabled", Message: residual(r.Spec.Traits)})
		}
	case ProvingKill:
		if on == Rejected {
			r.Proven, r.Residue = true, residual(r.Spec.Traits)
			m.announce(NoticeSuspended, Notice{Reason: r.Reason, Grade: "proven", Message: r.Residue})
		} else if on == Lost {
			r.Residue = o.Message
		}
	case SweepingKill:
		r.Swept = true
		m.disabled(o)
		if r.Spec.Traits.Unfenced { // only now can no frozen worker bring one back
			m.announce(NoticeSuspended, Notice{Reason: r.Reason, Grade: "confirmed", Message: r.Residue})
		}
	case Clearing:
		r.Dead = nil
	}
}

func residual(t rotators.Traits) string {
	if t.Residual == 0 {
		return ""
	}
	return "tokens that were already issued may live on for " + Duration(t.Residual).String()
}

func published(v Version) Published {
	return Published{Generation: v.Generation, OpID: v.OpID, Version: v.ID}
}

// disabled adds what a kill found to the versions that restore will delete.
func (m *machine) disabled(o Outcome) {
	for _, id := range o.Versions {
		if !slices.ContainsFunc(m.r.Dead, func(v Version) bool { return v.ID == id }) {
			m.r.Dead = append(m.r.Dead, Version{ID: id})
		}
	}
}

// promoted makes the candidate current and opens the overlap.
func (m *machine) promoted() {
	r := &m.r
	c := *r.Candidate
	c.PromotedAt = m.now
	n := Notice{Generation: c.Generation, Reason: r.Reason}
	if c.Revert {
		n.Reason = "rollback"
	}
	c.Revert = false
	r.Old = nil
	if r.Plan != InPlace && r.Current != nil {
		r.Old = r.Current
		r.DrainMin, r.DrainMax = m.now.Add(r.Spec.Overlap.Min.D()), m.now.Add(r.Spec.Overlap.Max.D())
		if r.Emergency == nil {
			n.ValidUntil = r.DrainMin
		}
	}
	if r.Plan == InPlace && !r.GapFrom.IsZero() {
		n.Gap = Duration(m.now.Sub(r.GapFrom))
	}
	r.GapFrom = time.Time{}
	r.Previous, r.Published = r.Published, published(c)
	r.Current, r.Candidate = &c, nil
	r.Noted, r.NotedAt = nil, time.Time{}
	r.Acks, r.Ending, r.Overdue, r.Failed, r.Denied, r.LastRotation = nil, false, false, 0, 0, m.now
	if r.Plan == InPlace {
		r.Proven, r.Residue = false, "in place: the old secret was overwritten, which no login proves"
	}
	m.announce(NoticeRotated, n)
}

// begin allocates the next generation.
func (m *machine) begin(reason string) {
	r := &m.r
	r.Generation++
	r.Reason, r.NextRotation, r.Bounced = reason, time.Time{}, 0
	r.Noted, r.NotedAt = nil, time.Time{}
	r.Candidate = &Version{Generation: r.Generation, Epoch: r.Epoch, OpID: r.Op().ID, CreatedAt: m.now}
	m.enter(Admitted)
}

// againReason is why a generation begins without a request of its own.
func (m *machine) againReason(from Phase) string {
	if from == Clearing {
		return "restore"
	}
	return ModeReplace
}

// settle returns to idle: done, or to try again later with a new generation.
func (m *machine) settle(from Phase) {
	r := &m.r
	m.enter(Idle)
	r.Bounced, r.Hold = 0, false
	if from == Discarding {
		r.NextRotation = m.now
		if r.Failed > 0 {
			r.NextRotation = m.now.Add(backoff(r.ID, r.Failed-1, redoBase, redoMost))
		}
		if r.Denied >= failedToPark {
			r.Parked = &Failure{Class: rotators.Refused.String(), Phase: Idle, At: m.now,
				Message: fmt.Sprintf("%s in a row came to nothing: the issuer refused the new credential, or the store to hold it", rotations(r.Failed))}
			m.announce(NoticeRotationFailed, Notice{Reason: "parked", Message: r.Parked.Message})
		}
		return
	}
	r.Reason, r.Emergency = "", nil
	r.NextRotation = time.Time{}
}

// patience is the longest wait between two tries.
func (m *machine) patience() time.Duration {
	if m.r.Urgent() {
		return urgentMost
	}
	return retryMost
}

// retry leaves the phase as it is and tries again later, for ever.
func (m *machine) retry(o Outcome) error {
	r := &m.r
	if r.Phase == ProvingKill && r.Attempt+1 >= announceTry {
		// Disabled is confirmed; the proof by login is not to be had. Say so instead of hiding the first grade behind the second.
		m.move(Outcome{Worker: o.Worker, Phase: o.Phase, Message: "not proven by login: " + o.Message}, Lost, Suspended)
		return nil
	}
	if o.Class == rotators.Unsure {
		m.startGap(r.Claim.At)
	}
	r.Attempt++
	r.Claim = nil
	r.RetryAt = m.now.Add(max(o.RetryAfter, backoff(r.ID, r.Attempt-1, retryBase, m.patience())))
	message := said(o, o.Result)
	r.Failure = &Failure{Class: o.Class.String(), Phase: r.Phase, Message: message, At: m.now}
	m.did(o.Worker, "retry "+string(r.Phase), message)
	m.complain()
	return nil
}

// said is what an outcome has to say for itself.
func said(o Outcome, on Result) string {
	if o.Message != "" {
		return o.Message
	}
	return string(o.Phase) + ": " + string(on)
}

// gaveUp counts and announces a generation that comes to nothing.
func (m *machine) gaveUp(message string) {
	m.r.Failed++
	m.announce(NoticeRotationFailed, Notice{Reason: m.r.Reason, Message: message})
}

func rotations(n int) string {
	if n == 1 {
		return "1 rotation"
	}
	return fmt.Sprintf("%d rotations", n)
}

// park waits for a human. Whatever works goes on working.
func (m *machine) park(o Outcome) {
	r := &m.r
	message := said(o, o.Result)
	class := o.Class
	if o.Result != Failed {
		class = rotators.Refused
	}
	r.Claim = nil
	r.Parked = &Failure{Class: class.String(), Phase: r.Phase, Message: message, At: m.now}
	m.did(o.Worker, "park "+string(r.Phase), message)
	m.announce(NoticeRotationFailed, Notice{Reason: "parked", Message: message})
}
