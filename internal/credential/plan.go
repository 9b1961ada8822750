package credential

// Result is what came of a phase's effect, or the order that ends a phase.
type Result string

const (
	Done      Result = "done"
	Accepted  Result = "accepted"  // the login succeeded
	Rejected  Result = "rejected"  // the issuer refused the credential itself
	Unknown   Result = "unknown"   // nothing was learnt: the same again, later
	Unclear   Result = "unclear"   // the effect may have happened: died, timed out, or the reply was lost
	Lost      Result = "lost"      // the secret is nowhere to be read
	Found     Result = "found"     // the lost mint's version is known
	Nothing   Result = "nothing"   // there was no mint
	Ambiguous Result = "ambiguous" // several versions could be it, or the target is shared
	Failed    Result = "failed"    // see Outcome.Class

	began      Result = "tick" // a worker takes up an admitted generation
	ended      Result = "overlap over"
	swept      Result = "sweep due"
	rolledBack Result = "rollback"
	restored   Result = "restore"
	killed     Result = "kill"
)

// rule is one line of the plan table: in plan (empty: any) and phase from, result on leads to phase to, if guard holds.
// The first rule that fits wins; a pair that none fits is refused.
type rule struct {
	plan  Plan
	from  Phase
	on    Result
	when  string // the guard, for the diagram
	guard func(*Record) bool
	to    Phase
}

func replacing(r *Record) bool { return r.Emergency != nil && r.Emergency.Mode == ModeReplace }

// outdated: an emergency came after the generation that consumers read was admitted.
func outdated(r *Record) bool {
	return replacing(r) && (r.Current == nil || r.Current.Epoch < r.Emergency.Epoch)
}

func reverting(r *Record) bool { return r.Candidate != nil && r.Candidate.Revert }
func first(r *Record) bool     { return r.Published.Generation == 0 && len(r.Doubtful) == 0 }

// firstOutdated: an emergency came while the very first generation was being promoted.
func firstOutdated(r *Record) bool {
	return first(r) && replacing(r) && r.Candidate.Epoch < r.Emergency.Epoch
}

func outOfPlace(r *Record) bool  { return r.Plan != InPlace }
func nothingLive(r *Record) bool { return r.Current == nil }

// table is the whole protocol. Failures, retries and parking apply to every phase alike and are not in it; see outcome.go.
var table = []rule{
	{"", Adopting, Accepted, "", nil, Idle},

	{Minted, Admitted, began, "", nil, Noting},
	{Minted, Noting, Done, "", nil, Minting},
	{Minted, Minting, Done, "", nil, Staging},
	{Minted, Minting, Unclear, "", nil, Attributing},
	{Minted, Attributing, Found, "", nil, Withdrawing},
	{Minted, Attributing, Nothing, "", nil, Minting},
	{Minted, Staging, Done, "", nil, Proving},
	{Minted, Staging, Lost, "", nil, Withdrawing},

	{"", Admitted, began, "", nil, Staging},
	{"", Staging, Done, "", nil, Applying},
	{"", Applying, Done, "", nil, Proving},
	// In place there is no way to tell a change that happened from sessions that were not ended: the same once more.
	{"", Applying, Unclear, "", outOfPlace, Checking},
	{"", Checking, Accepted, "", nil, Promoting},
	{"", Checking, Rejected, "", nil, Applying},

	{"", Proving, Accepted, "", nil, Promoting},
	{"", Proving, Rejected, "of a rollback", reverting, Discarding},
	{InPlace, Proving, Rejected, "", nil, Applying},
	{"", Proving, Rejected, "", nil, Withdrawing},
	{"", Withdrawing, Done, "", nil, Discarding},
	{"", Discarding, Done, "of a rollback", reverting, Draining},
	{"", Discarding, Done, "replace pending", outdated, Admitted},
	{"", Discarding, Done, "", nil, Idle},

	{"", Promoting, Done, "the first, replace pending", firstOutdated, Admitted},
	{"", Promoting, Done, "the first", first, Idle},
	{InPlace, Promoting, Done, "", nil, Destroying},
	{"", Promoting, Done, "restored", nothingLive, Destroying},
	{"", Promoting, Done, "replace", replacing, Disabling},
	{"", Promoting, Done, "", nil, Draining},

	{"", Draining, ended, "", nil, Disabling},
	{"", Draining, rolledBack, "", nil, Reverting},
	{"", Reverting, Done, "", nil, Proving},
	{"", Reverting, Lost, "", nil, Discarding},
	{"", Disabling, Done, "", nil, ProvingDead},
	{"", ProvingDead, Rejected, "", nil, Deleting},
	{"", ProvingDead, Lost, "the issuer's census says so", nil, Deleting},
	{"", ProvingDead, Accepted, "", nil, Disabling},
	{"", Deleting, Done, "", nil, Destroying},
	{"", Destroying, Done, "replace pending", outdated, Admitted},
	{"", Destroying, Done, "", nil, Idle},

	{"", Killing, Done, "", nil, ProvingKill},
	{"", ProvingKill, Rejected, "", nil, Suspended},
	{"", ProvingKill, Lost, "not proven", nil, Suspended},
	{"", ProvingKill, Accepted, "", nil, Killing},
	{"", Suspended, swept, "", nil, SweepingKill},
	{"", SweepingKill, Done, "", nil, Suspended},
	{"", Suspended, restored, "", nil, Clearing},
	{"", Clearing, Done, "", nil, Admitted},
}

// follow finds the rule for r's phase and a result.
func follow(r *Record, on Result) (Phase, bool) {
	for _, u := range table {
		if (u.plan == "" || u.plan == r.Plan) && u.from == r.Phase && u.on == on && (u.guard == nil || u.guard(r)) {
			return u.to, true
		}
	}
	return "", false
}

// acts reports whether a worker performs something in phase p.
func (p Phase) acts() bool {
	switch p {
	case Idle, Admitted, Draining, Suspended:
		return false
	}
	return true
}

// Phases lists every phase in the order of the protocol.
func Phases() []Phase {
	return []Phase{
		Idle, Adopting, Admitted, Noting, Minting, Attributing, Staging, Applying, Checking, Proving, Promoting, Draining,
		Reverting, Disabling, ProvingDead, Deleting, Destroying, Withdrawing, Discarding,
		Killing, ProvingKill, Suspended, SweepingKill, Clearing,
	}
}
