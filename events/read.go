package events

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Read calls fn for every retained event that f selects, from since (zero: the oldest) to the newest at the time of the
// call, in order, and returns. What it made on the server vanishes within seconds. An error of fn ends it and is returned. Messages that are no events
// are passed over and reported together in the error at the end.
func Read(ctx context.Context, nc *nats.Conn, f Filter, since Since, fn func(Event) error) error {
	if err := read(ctx, nc, f, since, fn); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	return nil
}

func read(ctx context.Context, nc *nats.Conn, f Filter, since Since, fn func(Event) error) error {
	if err := f.Validate(); err != nil {
		return err
	}
	if err := since.validate(); err != nil {
		return err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	c := jetstream.OrderedConsumerConfig{FilterSubjects: f.subjects(), MaxResetAttempts: 10, InactiveThreshold: 2 * pullExpiry}
	c.DeliverPolicy, c.OptStartSeq, c.OptStartTime = since.policy(jetstream.DeliverAllPolicy)
	consumer, err := js.OrderedConsumer(ctx, Stream, c)
	if err != nil {
		return explain(nc, err)
	}
	info, err := consumer.Info(ctx)
	if err != nil {
		return explain(nc, err)
	}
	if info.NumPending == 0 {
		return nil
	}
	// Only what is pending now: a busy stream must not keep the reader for ever.
	left := info.NumPending
	messages, err := consumer.Messages(jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(pullHeartbeat))
	if err != nil {
		return explain(nc, err)
	}
	defer messages.Stop()
	var bad int
	var first error
	for ; left > 0; left-- {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return explain(nc, err)
		}
		e, meta, err := decodeMessage(msg)
		if err != nil {
			if bad++; first == nil {
				first = err
			}
		} else if err := fn(e); err != nil {
			return err
		}
		if meta != nil && meta.NumPending == 0 { // retention may have removed some of them
			break
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d messages on %s are not events, the first: %w", bad, Stream, first)
	}
	return nil
}
