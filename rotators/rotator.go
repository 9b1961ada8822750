// Package rotators is the contract between the engine and everything that issues credentials.
//
// A provider is one package below this one. It implements [Rotator] for one credential of one target and passes
// rotatortest. It knows nothing of schedules, ledgers, stores or events.
package rotators

import (
	"context"
	"io"
	"time"

	"github.com/google/uuid"
)

// Op is the idempotency key and the fence of everything done for one generation of one credential.
//
// Fence order is (Epoch, Generation): a rotator whose issuer can hold a fence refuses with class [Conflict], and
// changes nothing, when the slot it is about to write carries a newer pair. Within one Op the order is Apply, Disable,
// Delete: once an Op has disabled a version, an Apply with the same Op is refused as well, and only a newer Op may
// enable or apply that slot again. So a worker that was frozen before a statement cannot bring a dead version to life.
type Op struct {
	// ID is a UUID v5 of (ledger incarnation, credential, generation); see [NewOpID].
	ID         uuid.UUID `json:"id"`
	Credential string    `json:"credential"`
	Generation uint64    `json:"generation"`
	Epoch      uint64    `json:"epoch"`
}

// Newer reports whether o is strictly later than (epoch, generation) in fence order.
func (o Op) Newer(epoch, generation uint64) bool {
	if o.Epoch != epoch {
		return o.Epoch > epoch
	}
	return o.Generation > generation
}

// VersionID is the issuer's own name for one version: a role, an access-key id, a token's accessor. It is not secret.
type VersionID string

// Version is what Apply made.
type Version struct {
	ID VersionID
	// Material is what the issuer minted. It is empty where the engine chose the secret.
	Material Material
}

// VersionInfo is one row of the issuer's census.
type VersionInfo struct {
	ID VersionID `json:"id"`
	// Ours is true only if the issuer itself shows that rekey made this version for this credential.
	Ours bool `json:"ours"`
	// Enabled is true if a login with this version could succeed.
	Enabled bool `json:"enabled"`
	// Generation, Epoch and OpID are what the issuer holds as fence or tag; zero where it holds none.
	Generation uint64    `json:"generation,omitempty"`
	Epoch      uint64    `json:"epoch,omitempty"`
	OpID       uuid.UUID `json:"op_id,omitzero"`
	// CreatedAt and LastUsedAt are zero where the issuer does not tell.
	CreatedAt  time.Time `json:"created_at,omitzero"`
	LastUsedAt time.Time `json:"last_used_at,omitzero"`
	// Sessions counts live sessions where the issuer tells, else 0.
	Sessions int `json:"sessions,omitempty"`
}

// Verdict is the answer of one login attempt.
type Verdict int

// Only an issuer's own authentication codes mean Rejected. Network trouble, limits and configuration mean Unknown.
const (
	Unknown  Verdict = iota // nothing was learnt; ask again
	Accepted                // the login succeeded
	Rejected                // the issuer refused the credential itself
)

func (v Verdict) String() string {
	switch v {
	case Accepted:
		return "accepted"
	case Rejected:
		return "rejected"
	default:
		return "unknown"
	}
}

// Traits are what an issuer can and cannot do. The zero value promises nothing and is invalid: MaxLive must be >= 1.
type Traits struct {
	MaxLive   int           `json:"max_live"`           // versions live at once, >= 1
	Minted    bool          `json:"minted,omitempty"`   // the issuer picks the bytes
	Countable bool          `json:"countable"`          // Inspect sees every live version
	Kills     bool          `json:"kills"`              // Disable ends live sessions
	Unfenced  bool          `json:"unfenced,omitempty"` // the issuer cannot hold a fence
	Tagged    bool          `json:"tagged,omitempty"`   // a minted version shows its op in Inspect
	Settle    time.Duration `json:"settle,omitempty"`   // Prove may be refused this long after Apply
	Residual  time.Duration `json:"residual,omitempty"` // access that outlives Disable, such as issued tokens
}

// Rotator changes one kind of credential at its issuer. One value serves one credential of one target, and may be used
// by several goroutines.
//
// Any call may be repeated with the same Op after a crash at any instant; the repeat has the same effect and result, or
// fails with class [Unsure]. An Op older than what the issuer's fence holds fails with class [Conflict] and changes
// nothing. Errors are *[Fault]; see [ClassOf]. No error holds secret bytes.
type Rotator interface {
	Traits() Traits
	// Apply makes the op's version live. For a minted kind m is empty and the Version carries what was minted;
	// a repeat after a lost reply cannot carry it again and is Unsure. Otherwise m is what Compose made, and the Version's id
	// is the one that Compose named.
	Apply(ctx context.Context, op Op, m Material) (Version, error)
	// Prove logs in as the version, never as admin, on a fresh connection. The error explains a verdict of
	// Unknown; it is nil for Accepted and Rejected.
	Prove(ctx context.Context, op Op, id VersionID, m Material) (Verdict, error)
	// Disable refuses further logins and ends live sessions. It is reversible; nil if already so or gone.
	Disable(ctx context.Context, op Op, id VersionID) error
	// Enable undoes Disable where the issuer still holds the secret. It needs an Op newer than the one that disabled.
	Enable(ctx context.Context, op Op, id VersionID) error
	// Delete removes the version for good; nil if already gone. On a slot that is reused it leaves the slot empty.
	Delete(ctx context.Context, op Op, id VersionID) error
	// Inspect lists the versions that the issuer holds for this credential, ours and foreign.
	Inspect(ctx context.Context) ([]VersionInfo, error)
	// Close releases connections. The Rotator must not be used afterwards.
	Close() error
}

// Composer is implemented by every Rotator whose Traits do not say Minted.
type Composer interface {
	// Compose chooses the next version's slot, never one of inUse, and draws its secret from random. It has no effect
	// at the issuer. Repeated with the same op and inUse it names the same slot (with another secret); a slot that no
	// longer exists for this credential is an error of class Rejected.
	Compose(op Op, inUse []VersionID, random io.Reader) (VersionID, Material, error)
}

// Finding is one thing that Check found wrong. Message says what is wrong, Remedy what to run or change.
type Finding struct {
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
	// Fatal means that rotating would be unsafe or cannot work.
	Fatal bool `json:"fatal"`
}

// Checker is implemented by a Rotator that can tell, without changing anything, whether it would work: the admin can
// log in, has its privileges, and a random secret is refused (an issuer that trusts everybody would "prove" anything).
type Checker interface {
	Check(ctx context.Context) ([]Finding, error)
}

// Recorder receives every statement or request, redacted, before it is sent. Nil records nothing.
type Recorder func(ctx context.Context, op Op, statement string)

// NewOpID derives the id of the op for one generation of one credential under one ledger incarnation.
func NewOpID(incarnation uuid.UUID, credential string, generation uint64) uuid.UUID {
	return uuid.NewSHA1(incarnation, appendGeneration(credential, generation))
}
