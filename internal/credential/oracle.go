package credential

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

// Observation is everything that can be seen of a system from outside its engine, at rest or in flight. A credential
// that is missing from Census, Stored or Verdicts was not looked up there, and is not judged by it.
type Observation struct {
	Now     time.Time
	Records []Record
	// Census is what each issuer says.
	Census map[ID][]rotators.VersionInfo
	// Stored is what each stage (current, pending, previous) of the store holds; a missing stage is empty.
	Stored map[ID]map[string]Published
	// Verdicts are logins made with the store's material, by stage.
	Verdicts map[ID]map[string]rotators.Verdict
	// Entries and Events are the whole history; both empty if it was not read.
	Entries []Entry
	Events  []Seen
}

// Seen is one published event.
type Seen struct {
	Credential ID
	Type       string // the notice's type
	Rev        uint64
	ID         string
}

// Violation is one broken invariant of ARCHITECTURE.md, by its number.
type Violation struct {
	Invariant  int    `json:"invariant"`
	Credential ID     `json:"credential"`
	Message    string `json:"message"`
}

func (v Violation) String() string {
	return fmt.Sprintf("invariant %d: %s: %s", v.Invariant, v.Credential, v.Message)
}

// Audit is the oracle: it lists every violation that the observation shows, in the order of records and numbers. It is the
// same for tests and for operators, and empty for a healthy system at any instant, also with rotations in flight.
func Audit(o Observation) []Violation {
	var vs []Violation
	for _, r := range o.Records {
		j := &judge{r: r}
		j.inventory()
		if stored, ok := o.Stored[r.ID]; ok {
			j.store(stored)
		}
		if census, ok := o.Census[r.ID]; ok {
			j.issuer(census, o.Stored[r.ID])
		}
		if verdicts, ok := o.Verdicts[r.ID]; ok {
			j.logins(verdicts)
		}
		if o.Entries != nil || o.Events != nil {
			entries := entriesOf(o.Entries, r.ID)
			j.chain(entries)
			j.events(entries, o.Events)
			j.overlaps(entries)
		}
		slices.SortStableFunc(j.found, func(a, b Violation) int { return cmp.Compare(a.Invariant, b.Invariant) })
		vs = append(vs, j.found...)
	}
	return vs
}

func entriesOf(all []Entry, id ID) []Entry {
	var es []Entry
	for _, e := range all {
		if e.Credential == id {
			es = append(es, e)
		}
	}
	slices.SortFunc(es, func(a, b Entry) int { return cmp.Compare(a.Rev, b.Rev) })
	return es
}

type judge struct {
	r     Record
	found []Violation
}

func (j *judge) broke(invariant int, format string, args ...any) {
	j.found = append(j.found, Violation{invariant, j.r.ID, fmt.Sprintf(format, args...)})
}

func (j *judge) suspended() bool {
	return j.r.Phase == Suspended || j.r.Phase.killing() || j.r.Phase == Clearing
}

// inventory: every credential has an owner, an environment and a purpose.
func (j *judge) inventory() {
	s := j.r.Spec
	if s.Owner == "" || s.Environment == "" || s.Purpose == "" {
		j.broke(11, "owner %q, environment %q, purpose %q", s.Owner, s.Environment, s.Purpose)
	}
}

// store: what consumers read is what the record says; a chosen secret is durable before it is applied; nothing is left over.
func (j *judge) store(stored map[string]Published) {
	r := j.r
	current, pending, previous := stored["current"], stored["pending"], stored["previous"]
	same := func(a, b Published) bool { return a.Generation == b.Generation && a.OpID == b.OpID }
	switch {
	case same(current, r.Published):
	case (r.Phase == Promoting || r.Phase == Adopting) && r.Candidate != nil && current.Generation == r.Candidate.Generation:
	case r.Phase.killing() || r.Phase == Suspended || r.Phase == Clearing:
		// A kill may have overtaken a promote; nothing works, and restore will sort it out.
	default:
		j.broke(1, "the store's current is generation %d, the record published %d", current.Generation, r.Published.Generation)
	}
	switch r.Phase {
	case Applying, Checking, Proving:
		if r.Candidate != nil && (pending.Generation != r.Candidate.Generation || pending.OpID != r.Candidate.OpID) {
			j.broke(2, "generation %d is being applied, the store's pending is generation %d", r.Candidate.Generation, pending.Generation)
		}
	case Idle:
		if previous.Generation != 0 {
			j.broke(4, "idle, but the store still holds generation %d as previous", previous.Generation)
		}
		if pending.Generation > r.Generation {
			j.broke(4, "the store's pending is generation %d, which was never admitted", pending.Generation)
		}
	}
}

// issuer: never more live than allowed, exactly the intended ones at rest, none after a kill.
func (j *judge) issuer(census []rotators.VersionInfo, stored map[string]Published) {
	r := j.r
	live := map[rotators.VersionID]bool{}
	ours := 0
	for _, v := range census {
		known := slices.ContainsFunc(r.known(), func(k Version) bool { return k.ID == v.ID })
		if v.Enabled {
			live[v.ID] = true
		}
		if v.Enabled && (v.Ours || known) {
			ours++
			if !slices.Contains(r.intended(), v.ID) && r.resting() {
				if j.suspended() {
					j.broke(6, "version %s is live although the credential is %s", v.ID, r.Phase)
				} else {
					j.broke(4, "version %s is live in phase %s; intended are %v", v.ID, r.Phase, r.intended())
				}
			}
		}
	}
	if ours > r.Spec.Traits.MaxLive {
		j.broke(3, "%d versions of ours are live, the issuer's limit is %d", ours, r.Spec.Traits.MaxLive)
	}
	if j.suspended() || !r.Spec.Traits.Countable {
		return
	}
	if c, ok := stored["current"]; ok && c.Version != "" && !live[c.Version] && !(r.Plan == InPlace && !r.resting()) {
		j.broke(1, "consumers read version %s, which the issuer does not let in", c.Version)
	}
	for _, id := range r.intended() {
		if r.resting() && !live[id] {
			j.broke(4, "version %s should be live in phase %s", id, r.Phase)
		}
	}
}

// known are all versions that the record ever calls its own at this moment.
func (r Record) known() []Version { return append(r.Live(), r.Dead...) }

// resting reports whether the issuer's state is settled: no step of the phase can be half done.
func (r Record) resting() bool {
	switch r.Phase {
	case Idle, Draining:
		return true
	case Suspended:
		return r.Swept
	}
	return false
}

// intended are the versions that should be live at rest.
func (r Record) intended() []rotators.VersionID {
	var ids []rotators.VersionID
	if r.Current != nil {
		ids = append(ids, r.Current.ID)
	}
	if r.Old != nil && r.Phase == Draining {
		ids = append(ids, r.Old.ID)
	}
	return ids
}

// logins: what consumers read works, and what was killed does not.
func (j *judge) logins(verdicts map[string]rotators.Verdict) {
	r := j.r
	switch v := verdicts["current"]; {
	case j.suspended() && r.Phase != Killing && v == rotators.Accepted:
		j.broke(6, "the store's current secret still logs in after a kill")
	case !j.suspended() && v == rotators.Rejected && !(r.Plan == InPlace && !r.resting()):
		j.broke(1, "the secret that consumers read was refused")
	}
	if r.Phase == Draining && verdicts["previous"] == rotators.Rejected {
		j.broke(8, "the old secret was refused inside its overlap, which ends %s", r.drainEnd().Format(time.RFC3339))
	}
	if r.Phase == Idle && verdicts["previous"] == rotators.Accepted {
		j.broke(4, "idle, but the previous secret still logs in")
	}
}

// chain: entries are gapless, unedited, and each begins where the one before ended, so that every effect was intended first.
func (j *judge) chain(es []Entry) {
	j.found = append(j.found, VerifyChain(es, &j.r)...)
}

// VerifyChain checks one credential's entries, in order of Rev: hashes, gaps, continuity, and, with a record, that the last
// entry is the record's own. An empty history is a violation if the record has one.
func VerifyChain(es []Entry, r *Record) []Violation {
	var vs []Violation
	broke := func(id ID, format string, args ...any) {
		vs = append(vs, Violation{10, id, fmt.Sprintf(format, args...)})
	}
	for i, e := range es {
		if e.Hash != e.Sum() {
			broke(e.Credential, "audit entry %d was edited: its hash does not match", e.Rev)
		}
		if i == 0 {
			if e.Rev == 1 && e.Prev != "" {
				broke(e.Credential, "audit entry 1 names a predecessor")
			}
			continue
		}
		p := es[i-1]
		switch {
		case e.Rev != p.Rev+1:
			broke(e.Credential, "audit entries %d to %d are missing", p.Rev+1, e.Rev-1)
		case e.Prev != p.Hash:
			broke(e.Credential, "audit entry %d does not follow entry %d: one of them was replaced", e.Rev, p.Rev)
		case e.From != p.To:
			broke(e.Credential, "audit entry %d begins in %q, entry %d ended in %q", e.Rev, e.From, p.Rev, p.To)
		}
	}
	if r == nil {
		return vs
	}
	switch {
	case len(es) == 0:
		broke(r.ID, "there are no audit entries for %d commits", r.Rev)
	case es[len(es)-1].Hash != r.Entry.Hash:
		broke(r.ID, "the last audit entry is %d, the record's is %d", es[len(es)-1].Rev, r.Rev)
	}
	return vs
}

// events: each commit's events were published exactly once, and nothing else was.
func (j *judge) events(es []Entry, all []Seen) {
	type key struct {
		rev  uint64
		kind string
	}
	seen := map[key]map[string]bool{}
	for _, e := range all {
		if e.Credential != j.r.ID {
			continue
		}
		k := key{e.Rev, e.Type}
		if seen[k] == nil {
			seen[k] = map[string]bool{}
		}
		seen[k][e.ID] = true
	}
	for _, e := range es {
		for _, kind := range e.Announced {
			k := key{e.Rev, kind}
			switch len(seen[k]) {
			case 0:
				j.broke(5, "commit %d announced %s, but the event is missing", e.Rev, kind)
			case 1:
			default:
				j.broke(5, "commit %d: %s was published under %d ids", e.Rev, kind, len(seen[k]))
			}
			delete(seen, k)
		}
	}
	for k := range seen {
		j.broke(5, "event %s of commit %d was published, but never happened", k.kind, k.rev)
	}
}

// overlaps: an old version is not retired before the time that its event promised, an emergency apart.
func (j *judge) overlaps(es []Entry) {
	var until time.Time
	var epoch uint64
	for _, e := range es {
		if !e.ValidUntil.IsZero() {
			until, epoch = e.ValidUntil, e.Epoch
		}
		if e.From == Draining && e.To == Disabling && e.Epoch == epoch && e.At.Before(until) {
			j.broke(8, "commit %d retired the old version %s before its overlap ended", e.Rev, until.Sub(e.At))
		}
	}
}
