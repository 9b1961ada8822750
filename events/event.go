// Package events is what an application team imports: the events' types, their subjects and a durable subscription.
//
// Events are CloudEvents 1.0 in binary mode on NATS. They never hold a secret, only where to read it.
package events

import (
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
)

// The event types. A new version of a type gets a new suffix; the old one stays.
const (
	Rotated        = "dev.rekey.credential.rotated.v1"         // read the store again: there is a new version
	Revoked        = "dev.rekey.credential.revoked.v1"         // the old version is proven dead
	RotationFailed = "dev.rekey.credential.rotation_failed.v1" // abandoned or parked; the current version still works
	OverlapEnding  = "dev.rekey.credential.overlap_ending.v1"  // the old version stops soon
	Overdue        = "dev.rekey.credential.overdue.v1"         // the version is older than it should be
	Suspended      = "dev.rekey.credential.suspended.v1"       // an emergency disabled every version
)

// Types lists every event type.
func Types() []string {
	return []string{Rotated, Revoked, RotationFailed, OverlapEnding, Overdue, Suspended}
}

// Data is the payload of every type; fields that do not apply are absent.
type Data struct {
	Credential  string    `json:"credential"`
	Generation  uint64    `json:"generation"`
	Epoch       uint64    `json:"epoch"`
	Rev         uint64    `json:"rev"` // rises with every event of a credential, not by one
	Owner       string    `json:"owner"`
	Environment string    `json:"environment"`
	Store       string    `json:"store"`     // the configured store's name
	Reference   string    `json:"reference"` // where to read it: store name and credential, never a secret
	Reason      string    `json:"reason,omitempty"`
	Message     string    `json:"message,omitempty"`
	ValidUntil  time.Time `json:"valid_until,omitzero"` // the old version works at least until then
	GapSeconds  float64   `json:"gap_seconds,omitempty"`
	Grade       string    `json:"grade,omitempty"` // suspended: disabled or proven
	Lagging     []string  `json:"lagging,omitempty"`
}

// Event is one received event.
type Event struct {
	ID     string // UUID v5 of (incarnation, credential, rev, type): the same for every delivery
	Type   string
	Source string // the ledger: /rekey/<incarnation>
	// Subject is the credential's id, team/name.
	Subject string
	Time    time.Time
	Data    Data
	// Sequence is the position in the event stream, for resuming.
	Sequence uint64
}

// NewID derives an event's id.
func NewID(incarnation uuid.UUID, credential string, rev uint64, eventType string) string {
	return uuid.NewSHA1(incarnation, fmt.Appendf(nil, "event\x00%s\x00%d\x00%s", credential, rev, eventType)).String()
}

// TypeOf turns a notice's type, such as credential.rotated, into the event's: dev.rekey.credential.rotated.v1.
func TypeOf(notice string) string { return "dev.rekey." + notice + ".v1" }

// SubjectPrefix begins every event's subject.
const SubjectPrefix = "rekey.event."

// SubjectFor is the subject on which consumers receive an event: rekey.event.<type>.<team>.<name>, where <type> is the
// short name, such as rotated. Empty arguments become the wildcard *.
func SubjectFor(eventType, team, name string) string {
	star := func(s string) string {
		if s == "" {
			return "*"
		}
		return s
	}
	return SubjectPrefix + star(Short(eventType)) + "." + star(team) + "." + star(name)
}

// Short is the type's last word without prefix and version: rotated.
func Short(eventType string) string {
	s := strings.TrimPrefix(eventType, "dev.rekey.credential.")
	return strings.TrimSuffix(s, ".v1")
}
