package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
)

// Atomic batch publish (ADR-50): nats.go has no helper for it. Every message carries the batch's id and its number; the last
// one commits and is answered.
const (
	headerBatchID     = "Nats-Batch-Id"
	headerBatchSeq    = "Nats-Batch-Sequence"
	headerBatchCommit = "Nats-Batch-Commit"
)

// What a batch may hold. The server's limit is 1000 messages (error 10199); ours on bytes keeps a batch of large records
// from stalling the connection.
const (
	maxBatch      = 1000
	maxBatchBytes = 8 << 20
	headroom      = 512 // for the batch's own headers
)

// The server's codes for a batch.
const (
	codeStoreFailed   = 10077
	codeIDInProcess   = 10158 // the message id is being written by another batch
	codeIncomplete    = 10176 // messages were lost, or the leader changed
	codeDuplicateID   = 10201 // a message id was seen before
	codeTooManyAtOnce = 10210
)

// verdict is what an answer to a batch means.
type verdict int

const (
	unknown   verdict = iota // it may have been written
	committed                // all of it was written
	stale                    // nothing was: some member is stale or a repetition
	again                    // nothing was: send it again
	refused                  // nothing was: some member will never be accepted
	unsent                   // nothing was: the connection is gone
)

func (v verdict) String() string {
	return [...]string{"uncertain", "committed", "stale", "again", "refused", "unsent"}[v]
}

// judge names what the error of a batch means. Only answers that are given before anything is stored count as "nothing was".
func judge(err error) verdict {
	var api *jetstream.APIError
	switch {
	case err == nil:
		return committed
	case errors.As(err, &api):
		switch api.ErrorCode {
		case codeWrongLast, codeWrongLastReplicated, codeDuplicateID, codeIDInProcess:
			return stale
		case codeIncomplete, codeTooManyAtOnce:
			return again
		}
		if api.Code >= 400 && api.Code < 500 {
			return refused
		}
		return unknown
	case errors.Is(err, nats.ErrMaxPayload), errors.Is(err, nats.ErrBadSubject):
		return refused
	case neverSent(err):
		return again
	case errors.Is(err, errNotCommitted):
		return unsent
	default:
		return unknown
	}
}

// neverSent reports whether err says that the server did not get the message.
func neverSent(err error) bool {
	return errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders) ||
		errors.Is(err, nats.ErrReconnectBufExceeded)
}

// publish sends one atomic batch and returns the sequence of its first message.
func (l *Ledger) publish(msgs []*nats.Msg) (uint64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), l.cfg.Timeout)
	defer cancel()
	id := nuid.Next()
	for i, m := range msgs {
		m.Header.Set(headerBatchID, id)
		m.Header.Set(headerBatchSeq, strconv.Itoa(i+1))
		m.Header.Del(headerBatchCommit) // of an earlier try
		if i == len(msgs)-1 {
			break
		}
		if err := l.nc.PublishMsg(m); err != nil {
			return 0, fmt.Errorf("%w: %w", errNotCommitted, err)
		}
	}
	last := msgs[len(msgs)-1]
	last.Header.Set(headerBatchCommit, "1")
	reply, err := l.nc.RequestMsgWithContext(ctx, last)
	if err != nil {
		return 0, err
	}
	var ack struct {
		Error    *jetstream.APIError `json:"error"`
		Stream   string              `json:"stream"`
		Sequence uint64              `json:"seq"`
		Batch    string              `json:"batch"`
		Count    int                 `json:"count"`
	}
	if err := json.Unmarshal(reply.Data, &ack); err != nil {
		return 0, fmt.Errorf("unreadable answer: %w", err)
	}
	switch n := len(msgs); {
	case ack.Error != nil:
		return 0, ack.Error
	case ack.Stream != LedgerStream || ack.Batch != id || ack.Count != n || ack.Sequence < uint64(n):
		return 0, fmt.Errorf("unexpected answer from stream %q: batch %q of %d at %d, want %q of %d", ack.Stream, ack.Batch, ack.Count, ack.Sequence, id, n)
	default:
		return ack.Sequence - uint64(n) + 1, nil
	}
}

// errNotCommitted: the message that commits was not sent.
var errNotCommitted = errors.New("batch not sent")

// pause between tries of a batch of which nothing was written.
func pause(try int) time.Duration { return time.Duration(25<<(2*try)) * time.Millisecond }
