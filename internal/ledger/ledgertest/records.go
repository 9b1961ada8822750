package ledgertest

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/internal/credential"
)

// New is a record as a first commit writes it: rev 1, idle, nothing due, nothing announced.
func New(incarnation uuid.UUID, id credential.ID) credential.Record {
	return Next(credential.Record{
		Schema: credential.Schema, ID: id, Incarnation: incarnation, Managed: true, Phase: credential.Idle, Plan: credential.Overlapping,
		Spec: credential.Spec{Target: "pg", Store: "files", Owner: "payments", Environment: "test", Purpose: "conformance"},
	}, time.Time{})
}

// Next is r's next commit: rev + 1, chained audit entry, due at the given instant (zero: never), announcing the given types.
func Next(r credential.Record, due time.Time, announce ...string) credential.Record {
	prev := r.Entry.Hash
	r.Rev++
	r.Due, r.Announce = due, nil
	r.Entry = credential.Entry{
		Credential: r.ID, Rev: r.Rev, At: time.Now().UTC(), Actor: "ledgertest", Action: fmt.Sprintf("step %d", r.Rev),
		From: r.Phase, To: r.Phase, Generation: r.Generation, Epoch: r.Epoch, Prev: prev,
	}
	if r.Rev == 1 {
		r.Entry.From = ""
	}
	for _, kind := range announce {
		r.Announce = append(r.Announce, credential.Notice{Type: kind, Generation: r.Generation, Reason: "test"})
		r.Entry.Announced = append(r.Entry.Announced, kind)
	}
	r.Entry.Hash = r.Entry.Sum()
	return r
}
