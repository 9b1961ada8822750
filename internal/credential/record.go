// Package credential holds the protocol: what a credential's record is, the pure machine [Next] that moves it, and
// the oracle [Audit] that says whether the invariants hold. It performs nothing and reads no clock.
package credential

import (
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// Schema is the version of Record's JSON that this build writes. A record with a higher one is refused, untouched.
const Schema = 1

// What a ledger answers. They live here because the ledger's users and its implementations share only this package.
var (
	// ErrNotFound: the ledger has no such record.
	ErrNotFound = errors.New("not found")
	// ErrStale: someone else committed first; reload and ask Next again. Nothing of this commit was written.
	ErrStale = errors.New("stale: another commit came first")
	// ErrUncertain: the commit may or may not have been written; reload before doing anything else.
	ErrUncertain = errors.New("the commit's outcome is unknown")
	// ErrSchema: the record was written by a newer build.
	ErrSchema = errors.New("record has a newer schema")
)

// Record is everything the engine knows of one credential: one JSON value, changed only by Next, written only by a
// compare-and-set commit. It holds no secret. Announce, Entry and Due describe the commit that carries them.
type Record struct {
	Schema      int       `json:"schema"`
	ID          ID        `json:"id"`
	Incarnation uuid.UUID `json:"incarnation"`
	Rev         uint64    `json:"rev"`        // raised by every commit; the first is 1
	Epoch       uint64    `json:"epoch"`      // raised by every emergency
	Generation  uint64    `json:"generation"` // the highest ever admitted; 0 before the first
	Spec        Spec      `json:"spec"`
	Plan        Plan      `json:"plan"`
	// Adopted is the version that was taken over without having been made by us; empty otherwise.
	Adopted rotators.VersionID `json:"adopted,omitempty"`
	// Managed is false after the credential left the configuration: nothing new is admitted.
	Managed bool `json:"managed"`

	Phase Phase     `json:"phase"`
	Since time.Time `json:"since"` // when Phase was entered
	// Reason says why the generation in flight was admitted: initial, interval, manual, retry, replace, restore.
	Reason string `json:"reason,omitempty"`

	// Claim is the committed intent of one worker to perform the phase's effect; nil between steps.
	Claim   *Claim    `json:"claim,omitempty"`
	Attempt int       `json:"attempt,omitempty"`  // failed tries of this phase
	RetryAt time.Time `json:"retry_at,omitzero"`  // not before this instant
	Bounced int       `json:"bounced,omitempty"`  // times a check sent the record back to the step before it
	Failure *Failure  `json:"failure,omitempty"`  // the last one, until a step succeeds
	Parked  *Failure  `json:"parked,omitempty"`   // waits for a human: nothing happens until resume or an emergency
	Paused  bool      `json:"paused,omitempty"`   // no step starts, emergencies apart
	Hold    bool      `json:"hold,omitempty"`     // the overlap stays open
	Failed  int       `json:"failed,omitempty"`   // rotations abandoned in a row
	Denied  int       `json:"denied,omitempty"`   // of those: in a row, because the issuer or the store said no
	Swept   bool      `json:"swept,omitempty"`    // the second sweep of a kill is done
	Proven  bool      `json:"proven,omitempty"`   // the last revocation was proven: what it ended was refused at a login
	Foreign []string  `json:"foreign,omitempty"`  // versions at the issuer that are not ours, as last seen
	Residue string    `json:"residual,omitempty"` // why it is not proven, or what outlives it

	Candidate *Version  `json:"candidate,omitempty"` // made or being made, not yet read by consumers
	Current   *Version  `json:"current,omitempty"`   // what consumers read
	Old       *Version  `json:"old,omitempty"`       // what they read before, until it is proven dead
	Dead      []Version `json:"dead,omitempty"`      // disabled by a kill, not yet deleted
	// Published is the generation that the store's current holds. It outlives Current: a kill does not touch the store.
	Published Published `json:"published,omitzero"`
	// Previous is what Published was before the last promote, until it is destroyed.
	Previous Published `json:"previous,omitzero"`
	// Doubtful are generations that a kill overtook while they were being promoted: the store's current may be one of them
	// instead of Published, until the next promote has been cleaned up after.
	Doubtful []Published `json:"doubtful,omitempty"`
	// Noted are the issuer's ids before a mint, NotedAt the time of that census.
	Noted   []rotators.VersionID `json:"noted,omitempty"`
	NotedAt time.Time            `json:"noted_at,omitzero"`

	// The overlap: it ends at DrainMin if every required consumer has acknowledged, else at DrainMax.
	DrainMin time.Time            `json:"drain_min,omitzero"`
	DrainMax time.Time            `json:"drain_max,omitzero"`
	Acks     map[string]time.Time `json:"acks,omitempty"`
	Ending   bool                 `json:"ending,omitempty"` // overlap_ending was announced
	GapFrom  time.Time            `json:"gap_from,omitzero"`

	LastRotation time.Time `json:"last_rotation,omitzero"`
	NextRotation time.Time `json:"next_rotation,omitzero"` // zero: the scheduler has yet to arm it
	Overdue      bool      `json:"overdue,omitempty"`      // credential.overdue was announced

	Emergency *Emergency `json:"emergency,omitempty"` // until it is complete
	// Orders are the incidents that reached this record, the latest last: a repeat of one of them changes nothing.
	Orders []string `json:"orders,omitempty"`

	// Due is the next instant at which the record wants attention; zero for none. It becomes the schedule.
	Due time.Time `json:"due,omitzero"`
	// Announce is what this commit publishes.
	Announce []Notice `json:"announce,omitempty"`
	// Entry is this commit's audit entry.
	Entry Entry `json:"entry"`
}

// Version is one generation at the issuer.
type Version struct {
	ID         rotators.VersionID `json:"id,omitempty"` // empty until chosen or minted
	Generation uint64             `json:"generation"`
	Epoch      uint64             `json:"epoch"`
	OpID       uuid.UUID          `json:"op_id"`
	CreatedAt  time.Time          `json:"created_at,omitzero"`  // admitted
	AppliedAt  time.Time          `json:"applied_at,omitzero"`  // first known to be live
	PromotedAt time.Time          `json:"promoted_at,omitzero"` // consumers read it from here on
	// Revert marks a rollback: this generation carries the secret of an earlier one.
	Revert bool `json:"revert,omitempty"`
}

// Published names what the store's current stage holds.
type Published struct {
	Generation uint64             `json:"generation,omitempty"`
	OpID       uuid.UUID          `json:"op_id,omitzero"`
	Version    rotators.VersionID `json:"version,omitempty"`
}

// Claim is an intent: Worker performs Phase's effect and is done, or has given up, by Until.
type Claim struct {
	Worker string    `json:"worker"`
	Phase  Phase     `json:"phase"`
	At     time.Time `json:"at"`
	Until  time.Time `json:"until"`
}

// Failure is a step that did not succeed. Message holds no secret.
type Failure struct {
	Class   string    `json:"class"`
	Phase   Phase     `json:"phase"`
	Message string    `json:"message"`
	At      time.Time `json:"at"`
}

// Emergency is an order that overtakes everything else.
type Emergency struct {
	Mode     string    `json:"mode"` // kill or replace
	Incident string    `json:"incident"`
	Reason   string    `json:"reason,omitempty"`
	Actor    string    `json:"actor"`
	At       time.Time `json:"at"`
	Epoch    uint64    `json:"epoch"` // the epoch that it raised
}

// The two modes of an emergency.
const (
	ModeKill    = "kill"
	ModeReplace = "replace"
)

// Incident is the approved order for an emergency, with the exact list that it covers. Writing it is the emergency's commit:
// from then on no worker starts an effect for a listed credential until the order has reached its record, whoever dies.
type Incident struct {
	ID          string    `json:"id"`
	Mode        string    `json:"mode"`
	Credentials []ID      `json:"credentials"`
	Hash        string    `json:"hash"` // SHA-256 over mode and list
	Reason      string    `json:"reason,omitempty"`
	Actor       string    `json:"actor"`
	CreatedAt   time.Time `json:"created_at"`
	// Expanded is true once every listed record carries the order.
	Expanded bool `json:"expanded"`
}

// Control is the fleet-wide switch: while Paused nothing is admitted and no step starts, emergencies apart.
type Control struct {
	Paused bool      `json:"paused"`
	Actor  string    `json:"actor,omitempty"`
	Reason string    `json:"reason,omitempty"`
	At     time.Time `json:"at,omitzero"`
}

// Notice is one event of a commit: the ledger turns it into a CloudEvent.
type Notice struct {
	Type       string    `json:"type"` // one of the Notice constants
	Generation uint64    `json:"generation"`
	Reason     string    `json:"reason,omitempty"`
	ValidUntil time.Time `json:"valid_until,omitzero"` // the old version works at least until then
	Gap        Duration  `json:"gap,omitempty"`        // in-place only: time without a working secret in the store
	Grade      string    `json:"grade,omitempty"`      // suspended: disabled or proven
	Message    string    `json:"message,omitempty"`
	Lagging    []string  `json:"lagging,omitempty"` // required consumers that have not acknowledged
}

// Notice types; the events package prefixes them with dev.rekey. and suffixes the version.
const (
	NoticeRotated        = "credential.rotated"
	NoticeRevoked        = "credential.revoked"
	NoticeRotationFailed = "credential.rotation_failed"
	NoticeOverlapEnding  = "credential.overlap_ending"
	NoticeOverdue        = "credential.overdue"
	NoticeSuspended      = "credential.suspended"
)

// Op is the op of the generation in flight, at the record's epoch.
func (r Record) Op() rotators.Op { return r.opFor(r.Generation) }

func (r Record) opFor(generation uint64) rotators.Op {
	return rotators.Op{
		ID:         rotators.NewOpID(r.Incarnation, string(r.ID), generation),
		Credential: string(r.ID), Generation: generation, Epoch: r.Epoch,
	}
}

// Live lists the versions that the record holds to be usable, newest role first.
func (r Record) Live() []Version {
	var vs []Version
	for _, v := range []*Version{r.Candidate, r.Current, r.Old} {
		if v != nil && v.ID != "" {
			vs = append(vs, *v)
		}
	}
	return vs
}

// Lane is where the record's doorbell rings.
func (r Record) Lane() Lane {
	if r.Urgent() {
		return LaneRevoke
	}
	return LaneWork
}

// Ordered reports whether an incident has reached the record.
func (r Record) Ordered(incident string) bool { return slices.Contains(r.Orders, incident) }

// LastIncident is the last order that reached the record; empty for none.
func (r Record) LastIncident() string {
	if len(r.Orders) == 0 {
		return ""
	}
	return r.Orders[len(r.Orders)-1]
}

// States lists what State may answer.
func States() []string {
	return []string{"ok", "overdue", "retrying", "replacing", "restoring", "held", "paused", "unmanaged", "parked", "killing", "suspended"}
}

// State is the one word that an operator reads first.
func (r Record) State() string {
	switch {
	case r.Phase == Suspended:
		return "suspended"
	case r.Phase.killing():
		return "killing"
	case r.Parked != nil:
		return "parked"
	case r.Current == nil && (r.Phase == Clearing || r.Reason == "restore"):
		return "restoring" // nothing works until the new version is promoted
	case r.Paused:
		return "paused"
	case !r.Managed:
		return "unmanaged"
	case r.Hold:
		return "held"
	case r.Failure != nil:
		return "retrying"
	case r.Emergency != nil:
		return "replacing"
	case r.Overdue:
		return "overdue"
	default:
		return "ok"
	}
}
