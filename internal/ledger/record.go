package ledger

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Get loads a record and its sequence, which the next Commit names. Errors: ErrNotFound; ErrSchema for a record of a newer
// build, which must be left alone.
func (l *Ledger) Get(ctx context.Context, id credential.ID) (credential.Record, uint64, error) {
	if err := checkID(id); err != nil {
		return credential.Record{}, 0, err
	}
	m, err := l.last(ctx, recordSubject(id))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return credential.Record{}, 0, fmt.Errorf("credential %s: %w", id, credential.ErrNotFound)
	}
	if err != nil {
		return credential.Record{}, 0, fmt.Errorf("read credential %s: %w", id, err)
	}
	r, err := decodeRecord(m.Subject, m.Data)
	return r, m.Sequence, err
}

// decodeRecord looks at the schema before anything else: a newer record may not fit the type at all.
func decodeRecord(subject string, data []byte) (credential.Record, error) {
	v, err := decode[struct {
		Schema int `json:"schema"`
	}](data)
	if err != nil {
		return credential.Record{}, fmt.Errorf("read %s: %w", subject, err)
	}
	if v.Schema > credential.Schema {
		return credential.Record{}, fmt.Errorf("read %s: schema %d, this build knows %d: %w", subject, v.Schema, credential.Schema, credential.ErrSchema)
	}
	r, err := decode[credential.Record](data)
	if err != nil {
		return credential.Record{}, fmt.Errorf("read %s: %w", subject, err)
	}
	return r, nil
}

// List reads every record, in the order of their last commits. Records that cannot be read (ErrSchema) are missing from the
// result and named in the error, so a caller that goes on with the others has to decide so.
func (l *Ledger) List(ctx context.Context) ([]credential.Record, error) {
	at := map[credential.ID]int{}
	var records []credential.Record
	bad := map[string]error{}
	err := l.scan(ctx, scan{stream: LedgerStream, filter: recordPrefix + "*.*", last: true}, func(m jetstream.Msg, _ *jetstream.MsgMetadata) error {
		r, err := decodeRecord(m.Subject(), m.Data())
		if err != nil {
			bad[m.Subject()] = err
			return nil
		}
		if i, ok := at[r.ID]; ok { // committed again while we read
			records[i] = r
			return nil
		}
		at[r.ID] = len(records)
		records = append(records, r)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var errs []error
	for _, err := range bad {
		errs = append(errs, err)
	}
	return records, errors.Join(errs...)
}

// Watch calls fn with every record and then with every commit, in order, from one goroutine; commits in quick succession may
// be seen as the last one only. ready, if not nil, is called once after the records that existed. It survives reconnects
// and ends with ctx, whose error it returns. Records that cannot be read are logged and skipped.
func (l *Ledger) Watch(ctx context.Context, fn func(credential.Record), ready func()) error {
	return l.scan(ctx, scan{stream: LedgerStream, filter: recordPrefix + "*.*", last: true, follow: true, ready: ready}, func(m jetstream.Msg, _ *jetstream.MsgMetadata) error {
		r, err := decodeRecord(m.Subject(), m.Data())
		if err != nil {
			l.log.Error("record skipped", "subject", m.Subject(), "error", err)
			return nil
		}
		fn(r)
		return nil
	})
}
