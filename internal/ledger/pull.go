package ledger

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// A delivery that is neither acknowledged nor reported in progress for ackWait is delivered again.
const (
	ackWait         = 30 * time.Second
	inProgressEvery = 10 * time.Second
	// handBack is how long a failed delivery is kept before it is handed back at once. A delayed negative acknowledgement
	// would count as pending all the same, and die with us.
	handBack = time.Second
	repull   = 500 * time.Millisecond
)

// pull hands the messages of a durable consumer to at most limit concurrent calls of fn, and acknowledges those for which it
// returns nil. A failed one is handed back after a second, or at once when ctx ends. When ctx ends no more are pulled, and pull
// returns nil after the calls under way have returned; their context is not cancelled. ErrNotFound: there is no such
// consumer, or it was deleted. Everything else is retried.
func (l *Ledger) pull(ctx context.Context, stream, consumer string, limit int, fn func(context.Context, jetstream.Msg) error) error {
	if limit < 1 {
		return fmt.Errorf("pull from %s: limit %d is below 1", consumer, limit)
	}
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, limit)
	for ctx.Err() == nil {
		err := l.pullFrom(ctx, stream, consumer, slots, &running, fn)
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, jetstream.ErrConsumerNotFound), errors.Is(err, jetstream.ErrConsumerDeleted), errors.Is(err, jetstream.ErrConsumerDoesNotExist):
			return fmt.Errorf("consumer %s of %s: %w", consumer, stream, credential.ErrNotFound)
		default:
			l.log.Warn("pull failed", "consumer", consumer, "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(repull):
			}
		}
	}
	return nil
}

// pullFrom pulls until an error or the end of ctx.
func (l *Ledger) pullFrom(ctx context.Context, stream, consumer string, slots chan struct{}, running *sync.WaitGroup, fn func(context.Context, jetstream.Msg) error) error {
	look, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	cons, err := l.js.Consumer(look, stream, consumer)
	if err != nil {
		return err
	}
	for ctx.Err() == nil {
		if err := l.pullOnce(ctx, cons, slots, running, fn); err != nil {
			return err
		}
	}
	return nil
}

// pullOnce waits for a free slot and asks for as many messages as there are free slots.
func (l *Ledger) pullOnce(ctx context.Context, cons jetstream.Consumer, slots chan struct{}, running *sync.WaitGroup, fn func(context.Context, jetstream.Msg) error) error {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	held := 1
	for more := true; more; {
		select {
		case slots <- struct{}{}:
			held++
		default:
			more = false
		}
	}
	defer func() {
		for ; held > 0; held-- {
			<-slots
		}
	}()
	fetch, cancel := context.WithTimeout(ctx, pullExpiry)
	defer cancel()
	batch, err := cons.Fetch(held, jetstream.FetchContext(fetch), jetstream.FetchHeartbeat(pullHeartbeat))
	if err != nil {
		return err
	}
	for m := range batch.Messages() {
		if ctx.Err() != nil {
			_ = m.Nak() // so that others need not wait for ackWait
			continue
		}
		held--
		running.Add(1)
		go func() {
			defer running.Done()
			defer func() { <-slots }()
			l.handle(ctx, m, fn)
		}()
	}
	if err := batch.Error(); err != nil && fetch.Err() == nil {
		return err
	}
	return nil
}

// handle calls fn with a context that does not end with ctx, and keeps the delivery ours meanwhile. If fn does not
// return (runtime.Goexit, or the process dies), the message is delivered again after ackWait.
func (l *Ledger) handle(ctx context.Context, m jetstream.Msg, fn func(context.Context, jetstream.Msg) error) {
	done := make(chan struct{})
	defer close(done)
	go func() {
		t := time.NewTicker(l.inProgress)
		defer t.Stop()
		for {
			select {
			case <-done:
				return
			case <-t.C:
				_ = m.InProgress()
			}
		}
	}()
	if err := fn(context.WithoutCancel(ctx), m); err != nil {
		l.log.Warn("delivery handed back", "subject", m.Subject(), "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(handBack):
		}
		_ = m.Nak()
		return
	}
	if err := m.Ack(); err != nil {
		l.log.Warn("acknowledgement lost", "subject", m.Subject(), "error", err) // it comes again, and is a no-op then
	}
}
