package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/rekeyhq/rekey/internal/credential"
)

// commitTries bounds how often a batch of which nothing was written is sent: 25, 100 and 400 ms apart.
const commitTries = 4

// commitLoop is the one goroutine that writes records: it gathers what is waiting, sends it as one batch, and gathers what
// came meanwhile. After Close it commits what was accepted and ends.
func (l *Ledger) commitLoop() {
	defer close(l.stopped)
	var held []*request // did not fit, or waits for another of the same credential
	for open := true; open; {
		var batch []*request
		if batch, held, open = l.gather(held); len(batch) > 0 {
			l.flush(batch)
		}
	}
}

// gather takes what one batch can hold, at most one commit per credential, waiting up to Linger for more. The batch is empty if
// every caller has given up. open is false after Close, when nothing is left.
func (l *Ledger) gather(held []*request) (batch, rest []*request, open bool) {
	members := map[credential.ID]bool{}
	msgs, bytes, full := 0, 0, false
	take := func(q *request) {
		if members[q.id] || msgs+len(q.msgs) > maxBatch || msgs > 0 && bytes+q.bytes > maxBatchBytes {
			full = full || !members[q.id]
			members[q.id] = true // whoever follows for this credential waits behind it
			rest = append(rest, q)
			return
		}
		if !q.state.CompareAndSwap(waiting, taken) {
			return
		}
		members[q.id] = true
		msgs, bytes = msgs+len(q.msgs), bytes+q.bytes
		batch = append(batch, q)
	}
	for _, q := range held {
		take(q)
	}
	if len(batch) == 0 {
		select {
		case q := <-l.queue:
			take(q)
		case <-l.stop:
			select {
			case q := <-l.queue:
				take(q)
			default:
				return nil, nil, false
			}
		}
	}
	var linger <-chan time.Time
	if l.cfg.Linger > 0 {
		t := time.NewTimer(l.cfg.Linger)
		defer t.Stop()
		linger = t.C
	}
	for !full && len(rest) < maxBatch {
		select {
		case q := <-l.queue:
			take(q)
			continue
		default:
		}
		if linger == nil {
			break
		}
		select {
		case q := <-l.queue:
			take(q)
		case <-linger:
			linger = nil
		}
	}
	return batch, rest, true
}

// flush writes batch and answers each of its members. A stale member fails alone: it is evicted and the rest sent again.
func (l *Ledger) flush(batch []*request) {
	for try := 0; len(batch) > 0; {
		first, err := l.send(batch)
		switch v := judge(err); v {
		case committed:
			for _, q := range batch {
				q.done <- result{seq: first}
				first += uint64(len(q.msgs))
			}
			return
		case stale:
			fresh, evicted := l.evict(batch)
			if evicted == 0 && len(batch) > 1 {
				l.halve(batch)
				return
			}
			if evicted == 0 {
				fail(batch, fmt.Errorf("%w: %w", credential.ErrStale, err))
				return
			}
			batch = fresh
		case again:
			if try++; try >= commitTries {
				fail(batch, fmt.Errorf("the ledger does not accept commits, tried %d times: %w", try, err))
				return
			}
			time.Sleep(pause(try - 1))
		case refused:
			if len(batch) > 1 {
				l.halve(batch)
				return
			}
			fail(batch, err)
			return
		case unsent:
			fail(batch, err)
			return
		default:
			fail(batch, fmt.Errorf("%w: %w", credential.ErrUncertain, err))
			return
		}
	}
}

// send publishes the messages of batch and returns the sequence of the first.
func (l *Ledger) send(batch []*request) (uint64, error) {
	var msgs []*nats.Msg
	for _, q := range batch {
		msgs = append(msgs, q.msgs...)
	}
	start := time.Now()
	seq, err := l.publish(msgs)
	l.cfg.Observer.Batched(judge(err).String(), len(batch), len(msgs), time.Since(start))
	return seq, err
}

// halve finds the offender that the answer does not name.
func (l *Ledger) halve(batch []*request) {
	l.flush(batch[:len(batch)/2])
	l.flush(batch[len(batch)/2:])
}

func fail(batch []*request, err error) {
	for _, q := range batch {
		q.done <- result{err: err}
	}
}

// evict answers the members whose record has moved on with ErrStale, and returns the others. The server's answer does not say
// which member it means.
func (l *Ledger) evict(batch []*request) (fresh []*request, evicted int) {
	ctx, cancel := context.WithTimeout(context.Background(), l.cfg.Timeout)
	defer cancel()
	moved := make([]bool, len(batch))
	var g errgroup.Group
	g.SetLimit(16)
	for i, q := range batch {
		g.Go(func() error {
			_, seq, err := get[struct{}](ctx, l, recordSubject(q.id))
			moved[i] = (err == nil || errors.Is(err, credential.ErrNotFound)) && seq != q.seq
			return nil
		})
	}
	_ = g.Wait()
	for i, q := range batch {
		if moved[i] {
			q.done <- result{err: fmt.Errorf("sequence %d: %w", q.seq, credential.ErrStale)}
			evicted++
			continue
		}
		fresh = append(fresh, q)
	}
	return fresh, evicted
}
