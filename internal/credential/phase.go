package credential

// Phase says which step is intended or waited for. Every phase is a safe place to die in.
type Phase string

const (
	Idle         Phase = "idle"           // current is live; waits for the calendar
	Adopting     Phase = "adopting"       // prove and publish an existing credential
	Admitted     Phase = "admitted"       // a generation is allocated; nothing done
	Noting       Phase = "noting"         // minted: store writable? which ids does the issuer hold?
	Minting      Phase = "minting"        // minted: the issuer makes a version
	Attributing  Phase = "attributing"    // minted: was a version made whose reply was lost?
	Staging      Phase = "staging"        // store: pending
	Applying     Phase = "applying"       // issuer: candidate becomes live
	Checking     Phase = "checking"       // did an apply of unknown outcome happen? ask by logging in
	Proving      Phase = "proving"        // log in as the candidate
	Promoting    Phase = "promoting"      // store: pending becomes current
	Draining     Phase = "draining"       // the overlap
	Reverting    Phase = "reverting"      // rollback: stage the previous secret as a new generation
	Disabling    Phase = "disabling"      // issuer: old refuses logins, sessions end
	ProvingDead  Phase = "proving_dead"   // log in as the old one: must be refused
	Deleting     Phase = "deleting"       // issuer: old is removed
	Destroying   Phase = "destroying"     // store: previous is removed
	Withdrawing  Phase = "withdrawing"    // issuer: the candidate is removed
	Discarding   Phase = "discarding"     // store: pending is removed
	Killing      Phase = "killing"        // emergency: every version of ours is disabled
	ProvingKill  Phase = "proving_killed" // emergency: log in as each: must be refused
	Suspended    Phase = "suspended"      // killed; waits for restore
	SweepingKill Phase = "sweeping"       // emergency: disable again, in case a frozen worker came late
	Clearing     Phase = "clearing"       // restore: the killed versions are deleted
)

func (p Phase) killing() bool {
	return p == Killing || p == ProvingKill || p == SweepingKill
}

// Plan is the order of steps that an issuer's traits allow.
type Plan string

const (
	Overlapping Plan = "overlap"  // we choose the secret, the issuer holds two
	Minted      Plan = "minted"   // the issuer makes the secret
	InPlace     Plan = "in-place" // the issuer holds one: a gap, accepted by the credential
)
