package api

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// VerifyResult is what comparing the audit stream, the records and the event stream showed.
type VerifyResult struct {
	Credentials int `json:"credentials"`
	Entries     int `json:"entries"`
	Events      int `json:"events"`
	// Truncated counts the credentials whose first entry is not their first commit: older ones have left the stream.
	Truncated  int         `json:"truncated,omitempty"`
	Violations []Violation `json:"violations" doc:"The first 1000"`
	Found      int         `json:"found" doc:"How many violations there are"`
}

// Violation is one broken invariant of ARCHITECTURE.md, by its number.
type Violation struct {
	Invariant  int    `json:"invariant"`
	Credential string `json:"credential"`
	Message    string `json:"message"`
}

type verifyOutput struct{ Body VerifyResult }

const mostViolations = 1000

func (s *Server) verify(ctx context.Context, _ *struct{}) (*verifyOutput, error) {
	v := &verification{
		see: who(ctx).allows, incarnation: s.Ledger.Incarnation(), oldest: s.Now().Add(-s.EventRetention).Add(24 * time.Hour),
		records: map[credential.ID]credential.Record{}, chains: map[credential.ID]*chain{}, found: map[Violation]bool{},
	}
	// Records first: an entry that comes later is newer than its record, never missing.
	records, err := s.Ledger.List(ctx)
	if err != nil {
		return nil, s.unavailable("list records", err)
	}
	for _, r := range records {
		if v.see(r.ID.Team()) {
			v.records[r.ID] = r
		}
	}
	if err := s.Ledger.CatchUp(ctx); err != nil {
		s.Logger.Error("verify", "error", err)
		return nil, huma.NewError(http.StatusServiceUnavailable, "the audit stream is behind the ledger and does not catch up: /readyz shows how far")
	}
	if err := s.Ledger.Audit(ctx, ledger.Query{}, v.entry); err != nil {
		return nil, s.unavailable("read audit entries", err)
	}
	if err := s.Ledger.Events(ctx, ledger.Query{}, v.event); err != nil {
		return nil, s.unavailable("read events", err)
	}
	for id := range v.chains { // created while we read
		if _, ok := v.records[id]; !ok {
			if r, _, err := s.Ledger.Get(ctx, id); err == nil {
				r.Rev = 0 // known, and newer than what was read
				v.records[id] = r
			}
		}
	}
	v.close()
	return &verifyOutput{v.result()}, nil
}

// verification goes through both streams once, keeping one entry per credential.
type verification struct {
	see         func(team string) bool
	incarnation uuid.UUID
	oldest      time.Time // events of older entries may have left the stream
	records     map[credential.ID]credential.Record
	chains      map[credential.ID]*chain
	entries     int
	events      int
	truncated   int
	found       map[Violation]bool
}

// chain is where one credential's entries have come to.
type chain struct {
	first, last credential.Entry
	atRecord    *credential.Entry          // the entry of the record's own rev
	pending     map[uuid.UUID]announcement // by event id
}

type announcement struct {
	rev  uint64
	kind string
	seen int
}

func (v *verification) broke(vs ...credential.Violation) {
	for _, x := range vs {
		v.found[Violation{x.Invariant, string(x.Credential), x.Message}] = true
	}
}

// entry checks one entry against the one before it. credential.VerifyChain judges; it needs no more than a pair at a time.
func (v *verification) entry(e credential.Entry, _ uint64) error {
	if !v.see(e.Credential.Team()) {
		return nil
	}
	v.entries++
	c := v.chains[e.Credential]
	if c == nil {
		c = &chain{first: e, pending: map[uuid.UUID]announcement{}}
		v.chains[e.Credential] = c
		if e.Rev > 1 {
			v.truncated++
		}
		v.broke(credential.VerifyChain([]credential.Entry{e}, nil)...)
	} else {
		v.broke(credential.VerifyChain([]credential.Entry{c.last, e}, nil)...)
	}
	c.last = e
	if r, ok := v.records[e.Credential]; ok && r.Rev == e.Rev {
		c.atRecord = &e
	}
	if e.At.Before(v.oldest) {
		return nil
	}
	for _, notice := range e.Announced {
		kind := events.TypeOf(notice)
		id, err := uuid.Parse(events.NewID(v.incarnation, string(e.Credential), e.Rev, kind))
		if err != nil {
			return err
		}
		c.pending[id] = announcement{rev: e.Rev, kind: kind}
	}
	return nil
}

// event checks that one event was announced. What is older than the entries that were read, or newer, is not judged.
func (v *verification) event(e events.Event) error {
	id := credential.ID(e.Subject)
	if !v.see(id.Team()) {
		return nil
	}
	v.events++
	c := v.chains[id]
	switch {
	case c == nil:
		if _, ok := v.records[id]; !ok {
			v.broke(credential.Violation{Invariant: 5, Credential: id, Message: fmt.Sprintf("event %s is of a credential without audit entries", e.ID)})
		}
		return nil
	case e.Data.Rev < c.first.Rev || e.Data.Rev > c.last.Rev:
		return nil
	case e.Time.Before(v.oldest):
		return nil
	}
	eid, err := uuid.Parse(e.ID)
	a, ok := c.pending[eid]
	switch {
	case err != nil || !ok:
		v.broke(credential.Violation{Invariant: 5, Credential: id, Message: fmt.Sprintf("event %s (%s, commit %d) was published, but no audit entry announces it", e.ID, events.Short(e.Type), e.Data.Rev)})
		return nil
	case a.rev != e.Data.Rev || a.kind != e.Type:
		v.broke(credential.Violation{Invariant: 5, Credential: id, Message: fmt.Sprintf("event %s says %s of commit %d, announced was %s of commit %d", e.ID, events.Short(e.Type), e.Data.Rev, events.Short(a.kind), a.rev)})
	}
	a.seen++
	c.pending[eid] = a
	return nil
}

// close compares with the records, and reports what never came or came twice.
func (v *verification) close() {
	for id, r := range v.records {
		c := v.chains[id]
		switch {
		case r.Rev == 0:
		case c == nil:
			v.broke(credential.VerifyChain(nil, &r)...)
		case c.atRecord != nil:
			v.broke(credential.VerifyChain([]credential.Entry{*c.atRecord}, &r)...)
		default:
			v.broke(credential.VerifyChain([]credential.Entry{c.last}, &r)...)
		}
	}
	for id, c := range v.chains {
		if _, ok := v.records[id]; !ok && c.last.Action != "forget" {
			v.broke(credential.Violation{Invariant: 10, Credential: id, Message: fmt.Sprintf("there are audit entries up to commit %d, but no record", c.last.Rev)})
		}
		for eid, a := range c.pending {
			switch {
			case a.seen == 0:
				v.broke(credential.Violation{Invariant: 5, Credential: id, Message: fmt.Sprintf("commit %d announced %s, but event %s is missing", a.rev, events.Short(a.kind), eid)})
			case a.seen > 1:
				v.broke(credential.Violation{Invariant: 5, Credential: id, Message: fmt.Sprintf("event %s (%s, commit %d) is in the stream %d times", eid, events.Short(a.kind), a.rev, a.seen)})
			}
		}
	}
}

func (v *verification) result() VerifyResult {
	out := VerifyResult{Credentials: len(v.records), Entries: v.entries, Events: v.events, Truncated: v.truncated, Violations: []Violation{}, Found: len(v.found)}
	for x := range v.found {
		out.Violations = append(out.Violations, x)
	}
	slices.SortFunc(out.Violations, func(a, b Violation) int {
		return cmp.Or(strings.Compare(a.Credential, b.Credential), a.Invariant-b.Invariant, strings.Compare(a.Message, b.Message))
	})
	out.Violations = out.Violations[:min(len(out.Violations), mostViolations)]
	return out
}
