package ledger

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// doorbellWindow is how long a repeated ring is dropped. It must be shorter than the scheduler's sweep, which rings again.
const doorbellWindow = time.Minute

func checkLane(lane credential.Lane, target string) error {
	if lane != credential.LaneWork && lane != credential.LaneRevoke {
		return fmt.Errorf("unknown lane %q", lane)
	}
	return checkToken("target", target)
}

// Ring puts a doorbell for the record at rev into the target's lane. Repeating it within a minute is a no-op, also while the
// first is being worked on; a higher rev rings again. A doorbell that nobody takes is dropped after an hour.
func (l *Ledger) Ring(ctx context.Context, lane credential.Lane, target string, id credential.ID, rev uint64) error {
	if err := errors.Join(checkLane(lane, target), checkID(id)); err != nil {
		return err
	}
	m := nats.NewMsg(laneSubject(lane, target, id))
	m.Data = []byte(strconv.FormatUint(rev, 10))
	m.Header.Set(jetstream.MsgIDHeader, fmt.Sprintf("%s %s %s %d", lane, target, id, rev))
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	if _, err := l.js.PublishMsg(ctx, m); err != nil {
		return fmt.Errorf("ring %s: %w", m.Subject, err)
	}
	return nil
}

// EnsureLanes makes the target's two consumers, or sets their limit: at most concurrency credentials are worked on at once in
// each lane, across all workers.
func (l *Ledger) EnsureLanes(ctx context.Context, target string, concurrency int) error {
	if concurrency < 1 {
		return fmt.Errorf("target %s: concurrency %d is below 1", target, concurrency)
	}
	for _, lane := range credential.Lanes() {
		if err := checkLane(lane, target); err != nil {
			return err
		}
		_, err := l.js.CreateOrUpdateConsumer(ctx, WorkStream, jetstream.ConsumerConfig{
			Durable: laneConsumer(lane, target), FilterSubject: laneFilter(lane, target),
			AckPolicy: jetstream.AckExplicitPolicy, AckWait: l.ackWait, MaxDeliver: -1, MaxAckPending: concurrency,
		})
		if err != nil {
			return fmt.Errorf("make %s lane of target %s: %w", lane, target, err)
		}
	}
	return nil
}

// RemoveLanes removes the target's consumers and the doorbells that wait for them; nil if they are gone. Work on them returns.
func (l *Ledger) RemoveLanes(ctx context.Context, target string) error {
	stream, err := l.js.Stream(ctx, WorkStream)
	if err != nil {
		return fmt.Errorf("remove lanes of target %s: %w", target, err)
	}
	for _, lane := range credential.Lanes() {
		if err := checkLane(lane, target); err != nil {
			return err
		}
		if err := stream.DeleteConsumer(ctx, laneConsumer(lane, target)); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
			return fmt.Errorf("remove %s lane of target %s: %w", lane, target, err)
		}
		if err := stream.Purge(ctx, jetstream.WithPurgeSubject(laneFilter(lane, target))); err != nil {
			return fmt.Errorf("empty %s lane of target %s: %w", lane, target, err)
		}
	}
	return nil
}

// Work takes doorbells from a target's lane and calls fn, at most limit at once here and at most the target's concurrency
// across all workers. nil from fn ends the doorbell; after an error it is delivered again, here or elsewhere, a second
// later. When ctx ends Work takes no more and returns nil once the calls under way have returned: their context is not
// cancelled. ErrNotFound: the target has no lanes, or they were removed.
func (l *Ledger) Work(ctx context.Context, lane credential.Lane, target string, limit int, fn func(context.Context, credential.Doorbell) error) error {
	if err := checkLane(lane, target); err != nil {
		return err
	}
	prefix := strings.TrimSuffix(laneFilter(lane, target), ">")
	return l.pull(ctx, WorkStream, laneConsumer(lane, target), limit, func(ctx context.Context, m jetstream.Msg) error {
		id, err := idFrom(prefix, m.Subject())
		if err != nil {
			return l.drop(m, err)
		}
		bell := credential.Doorbell{Lane: lane, Target: target, ID: id, Delivery: 1}
		bell.Rev, _ = strconv.ParseUint(string(m.Data()), 10, 64)
		if meta, err := m.Metadata(); err == nil {
			bell.Delivery = meta.NumDelivered
		}
		return fn(ctx, bell)
	})
}

// drop ends a message that nobody will ever understand.
func (l *Ledger) drop(m jetstream.Msg, err error) error {
	l.log.Error("message dropped", "subject", m.Subject(), "error", err)
	return m.Term()
}

// Acks takes acknowledgements that consumers published, from at most limit goroutines. The subject's permissions vouch for
// the consumer, nothing vouches for the body. As in Work, nil ends one and after an error it is delivered again.
func (l *Ledger) Acks(ctx context.Context, limit int, fn func(ctx context.Context, id credential.ID, consumer string, body []byte, at time.Time) error) error {
	return l.pull(ctx, AckStream, ackConsumer, limit, func(ctx context.Context, m jetstream.Msg) error {
		rest := strings.TrimPrefix(m.Subject(), ackPrefix)
		i := strings.LastIndexByte(rest, '.')
		if i < 0 || !credential.ValidName(rest[i+1:]) {
			return l.drop(m, fmt.Errorf("subject %q names no consumer", m.Subject()))
		}
		id, err := idFrom("", rest[:i])
		if err != nil {
			return l.drop(m, err)
		}
		meta, err := m.Metadata()
		if err != nil {
			return l.drop(m, err)
		}
		return fn(ctx, id, rest[i+1:], m.Data(), meta.Timestamp)
	})
}
