package credential

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/google/uuid"
)

// Entry is the audit record of one commit. Entries of a credential form a chain by hash: entry n names the hash of n-1, so an
// edited, dropped or reordered one is found.
type Entry struct {
	Credential ID        `json:"credential"`
	Rev        uint64    `json:"rev"`
	At         time.Time `json:"at"`
	Actor      string    `json:"actor"`  // who caused it: a worker, scheduler or named identity
	Action     string    `json:"action"` // what: admit, intend apply, applied, parked, …
	From       Phase     `json:"from,omitempty"`
	To         Phase     `json:"to"`
	Generation uint64    `json:"generation"`
	Epoch      uint64    `json:"epoch"`
	OpID       uuid.UUID `json:"op_id,omitzero"`
	Detail     string    `json:"detail,omitempty"`
	// Announced lists the event types of the same commit.
	Announced []string `json:"announced,omitempty"`
	// ValidUntil is what the event rotated promised for the old version; zero without an overlap.
	ValidUntil time.Time `json:"valid_until,omitzero"`
	Prev       string    `json:"prev"` // hex SHA-256 of the entry before; empty for the first
	Hash       string    `json:"hash"` // hex SHA-256 of this entry's JSON with Hash empty
}

// Sum is the entry's hash, computed from its other fields.
func (e Entry) Sum() string {
	e.Hash = ""
	b, err := json.Marshal(e)
	if err != nil {
		panic("audit entry cannot be marshalled: " + err.Error()) // only plain fields: cannot happen
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
