// Package store is the contract of the places where consumers read secrets. Each implementation is a package below this
// one and passes storetest.
package store

import (
	"context"
	"errors"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// Stage names one of the three places that a credential's secret may be in.
type Stage string

// Current is what consumers read. Pending is staged and not yet applied or proven. Previous is what current was before the
// last Promote, kept until its version has been proven dead.
const (
	Current  Stage = "current"
	Pending  Stage = "pending"
	Previous Stage = "previous"
)

// ErrNotFound is returned by Get where the stage is empty. It is wrapped in a *rotators.Fault of class Refused.
var ErrNotFound = errors.New("no such secret")

// Key identifies one generation's secret. Generation and op live inside the secret's data, so that the store alone can tell
// what it holds.
type Key struct {
	Credential string    `json:"credential"`
	Generation uint64    `json:"generation"`
	OpID       uuid.UUID `json:"op_id"`
	// Version is the issuer's id, kept so that a store can be reconciled with its issuer; empty for a minted
	// kind before Apply.
	Version rotators.VersionID `json:"version,omitempty"`
}

// Same reports whether both name the same generation by the same op.
func (k Key) Same(o Key) bool {
	return k.Credential == o.Credential && k.Generation == o.Generation && k.OpID == o.OpID
}

// Secret is what one stage holds.
type Secret struct {
	Key      Key
	Material rotators.Material
}

// Store keeps the secrets of many credentials. It may be used by several goroutines and processes at once.
//
// Every call may be repeated after a crash at any instant and then has the same effect and result. Errors are *rotators.Fault:
// Transient and Throttled changed nothing, Unsure may have, Conflict found something else than was expected, Refused
// will not succeed unchanged. No error holds secret bytes.
type Store interface {
	// Stage makes s durable as pending, and returns what is pending. If pending already holds the same Key,
	// that is kept and returned (its material may differ from s: the earlier one wins, as it may have been applied).
	// A pending of a lower generation is replaced: it was abandoned. A generation is staged once: if current or previous holds
	// the same Key, that is returned and nothing changes; any other Key of the same or a higher generation in any stage is
	// Conflict, so that a worker that was frozen cannot leave an old secret behind. Material without fields is Refused.
	Stage(ctx context.Context, s Secret) (Secret, error)
	// Promote makes `to`, now pending or previous, what consumers read; what was current becomes previous.
	// from.Generation 0 means that nothing has been promoted yet. It is nil if current is `to` already with the same op,
	// and Conflict if current is neither `from` nor `to`, or `to` is nowhere.
	// A crash before it returns leaves either `from` or `to` current, never neither, and loses neither's material.
	Promote(ctx context.Context, to, from Key) error
	// Get reads one stage; ErrNotFound if it is empty.
	Get(ctx context.Context, credential string, stage Stage) (Secret, error)
	// Discard removes pending if it holds k; nil if it is empty or holds another key.
	Discard(ctx context.Context, k Key) error
	// Destroy removes previous if it holds k; nil if it is empty or holds another key.
	Destroy(ctx context.Context, k Key) error
	// Writable fails unless a secret for this credential could be written now. It leaves nothing behind.
	Writable(ctx context.Context, credential string) error
	// Reference says where a consumer finds the credential's current secret, such as file:/var/lib/rekey/secrets/x.age.
	Reference(credential string) string
	Close() error
}
