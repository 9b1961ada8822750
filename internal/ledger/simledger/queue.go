package simledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
)

// As the real ledger's.
const (
	doorbellWindow = time.Minute
	handBack       = time.Second
	ackWait        = 30 * time.Second
)

// queue delivers items at least once, at most limit at a time.
type queue struct {
	items   []*item
	limit   int
	removed bool
}

type item struct {
	id   credential.ID
	rev  uint64
	tag  uint64    // of an acknowledgement
	busy bool      // handed out
	at   time.Time // not again before
	n    uint64    // deliveries
}

// pending counts as the server does: also what waits to be delivered again.
func (q *queue) pending(now time.Time) int {
	n := 0
	for _, it := range q.items {
		if it.busy || it.n > 0 && it.at.After(now) {
			n++
		}
	}
	return n
}

// take hands out the first item that may be; otherwise it says when the next one may be (zero: unknown).
func (q *queue) take(now time.Time) (*item, time.Time) {
	var next time.Time
	room := q.pending(now) < q.limit
	for _, it := range q.items {
		switch {
		case it.busy:
		case it.at.After(now):
			if next.IsZero() || it.at.Before(next) {
				next = it.at
			}
		case room:
			it.busy = true
			it.n++
			return it, time.Time{}
		}
	}
	return nil, next
}

func (q *queue) remove(it *item) {
	q.items = slices.DeleteFunc(q.items, func(o *item) bool { return o == it })
}

// setSchedule writes or cancels the schedule of a commit, with the lock held.
func (l *Ledger) setSchedule(r credential.Record) {
	if r.Due.IsZero() {
		delete(l.cells, "schedule/"+string(r.ID))
		return
	}
	l.write("schedule/"+string(r.ID), fmt.Appendf(nil, "%d %s", r.Rev, r.Due.UTC().Format(time.RFC3339Nano)))
}

func schedule(c cell) (rev uint64, due time.Time) {
	a, b, _ := strings.Cut(string(c.data), " ")
	rev, _ = strconv.ParseUint(a, 10, 64)
	due, _ = time.Parse(time.RFC3339Nano, b)
	return rev, due
}

// fire turns the schedules that are due into rings and returns when the next one is, with the lock held.
func (l *Ledger) fire() (next time.Time) {
	now := l.cfg.Now()
	keys, cells := l.after("schedule/", 0)
	for i, key := range keys {
		rev, due := schedule(cells[i])
		if due.After(now) {
			if next.IsZero() || due.Before(next) {
				next = due
			}
			continue
		}
		delete(l.cells, key)
		id := credential.ID(strings.TrimPrefix(key, "schedule/"))
		l.due.items = slices.DeleteFunc(l.due.items, func(it *item) bool { return it.id == id }) // one message per subject
		l.due.items = append(l.due.items, &item{id: id, rev: rev})
	}
	return next
}

// Dues calls fn with the id of every record whose schedule has rung.
func (l *Ledger) Dues(ctx context.Context, limit int, fn func(context.Context, credential.ID) error) error {
	return l.consume(ctx, func() *queue { return l.due }, limit, func(ctx context.Context, it *item, _ uint64) error {
		return fn(ctx, it.id)
	})
}

// HasSchedule reports whether the record has a schedule that has not rung.
func (l *Ledger) HasSchedule(ctx context.Context, id credential.ID) (bool, error) {
	set, err := l.Schedules(ctx)
	_, ok := set[id]
	return ok, err
}

// Schedules is the set of credentials that have a schedule which has not rung.
func (l *Ledger) Schedules(ctx context.Context) (map[credential.ID]uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fire()
	set := map[credential.ID]uint64{}
	keys, cells := l.after("schedule/", 0)
	for i, key := range keys {
		set[credential.ID(strings.TrimPrefix(key, "schedule/"))], _ = schedule(cells[i])
	}
	return set, ctx.Err()
}

// LoseSchedule drops a record's schedule, as a race inside the server may.
func (l *Ledger) LoseSchedule(id credential.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.cells, "schedule/"+string(id))
}

// LoseDoorbells drops every doorbell that is not being worked on, as the loss of the work stream would.
func (l *Ledger) LoseDoorbells() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, q := range l.lanes {
		q.items = slices.DeleteFunc(q.items, func(it *item) bool { return !it.busy })
	}
	clear(l.rung)
}

// Rearm writes the schedule of a record that is due later and has none.
func (l *Ledger) Rearm(ctx context.Context, id credential.ID) error {
	r, _, err := l.Get(ctx, id)
	if err != nil {
		return err
	}
	has, err := l.HasSchedule(ctx, id)
	if err != nil || has || r.Due.IsZero() || !r.Due.After(l.cfg.Now()) {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.setSchedule(r)
	return nil
}

func laneKey(lane credential.Lane, target string) (string, error) {
	if lane != credential.LaneWork && lane != credential.LaneRevoke {
		return "", fmt.Errorf("unknown lane %q", lane)
	}
	return string(lane) + "/" + target, name("target", target)
}

// Ring puts a doorbell into the target's lane.
func (l *Ledger) Ring(ctx context.Context, lane credential.Lane, target string, id credential.ID, rev uint64) error {
	key, err := laneKey(lane, target)
	if _, bad := credential.ParseID(string(id)); errors.Join(err, bad, ctx.Err()) != nil {
		return errors.Join(err, bad, ctx.Err())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.cfg.Now()
	once := fmt.Sprintf("%s %s %d", key, id, rev)
	if at, ok := l.rung[once]; ok && now.Sub(at) < doorbellWindow {
		return nil
	}
	l.rung[once] = now
	q := l.lanes[key]
	if q == nil { // rung before the target's lanes exist
		q = &queue{removed: true}
		l.lanes[key] = q
	}
	q.items = append(q.items, &item{id: id, rev: rev})
	l.notify()
	return nil
}

// EnsureLanes makes the target's lanes, or sets their limit.
func (l *Ledger) EnsureLanes(ctx context.Context, target string, concurrency int) error {
	if concurrency < 1 {
		return fmt.Errorf("target %s: concurrency %d is below 1", target, concurrency)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, lane := range credential.Lanes() {
		key, err := laneKey(lane, target)
		if err != nil {
			return err
		}
		if l.lanes[key] == nil {
			l.lanes[key] = &queue{}
		}
		l.lanes[key].limit, l.lanes[key].removed = concurrency, false
	}
	l.notify()
	return ctx.Err()
}

// RemoveLanes removes the target's lanes and what waits in them.
func (l *Ledger) RemoveLanes(ctx context.Context, target string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, lane := range credential.Lanes() {
		key, err := laneKey(lane, target)
		if err != nil {
			return err
		}
		delete(l.lanes, key)
	}
	l.notify()
	return ctx.Err()
}

// Work takes doorbells from a target's lane.
func (l *Ledger) Work(ctx context.Context, lane credential.Lane, target string, limit int, fn func(context.Context, credential.Doorbell) error) error {
	key, err := laneKey(lane, target)
	if err != nil {
		return err
	}
	err = l.consume(ctx, func() *queue { return l.lanes[key] }, limit, func(ctx context.Context, it *item, n uint64) error {
		return fn(ctx, credential.Doorbell{Lane: lane, Target: target, ID: it.id, Rev: it.rev, Delivery: n})
	})
	if err != nil {
		return fmt.Errorf("lane %s: %w", key, err)
	}
	return nil
}

// Acknowledge is what a consumer's publishing of an acknowledgement does.
func (l *Ledger) Acknowledge(id credential.ID, consumer string, body []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	l.ackBody[l.seq] = ack{id, consumer, slices.Clone(body), l.cfg.Now()}
	l.acks.items = append(l.acks.items, &item{id: id, tag: l.seq})
	l.notify()
}

// Acks takes acknowledgements that consumers published.
func (l *Ledger) Acks(ctx context.Context, limit int, fn func(ctx context.Context, id credential.ID, consumer string, body []byte, at time.Time) error) error {
	return l.consume(ctx, func() *queue { return l.acks }, limit, func(ctx context.Context, it *item, _ uint64) error {
		l.mu.Lock()
		a := l.ackBody[it.tag]
		l.mu.Unlock()
		return fn(ctx, a.id, a.consumer, a.body, a.at)
	})
}

// consume hands items of the queue to at most limit calls of fn until ctx ends, then waits for those under way.
func (l *Ledger) consume(ctx context.Context, find func() *queue, limit int, fn func(context.Context, *item, uint64) error) error {
	if limit < 1 {
		return fmt.Errorf("limit %d is below 1", limit)
	}
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, limit)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		it, n, err := l.next(ctx, find)
		if it == nil {
			return err
		}
		running.Go(func() {
			defer func() { <-slots }()
			l.handle(ctx, find, it, func() error { return fn(context.WithoutCancel(ctx), it, n) })
		})
	}
}

// next waits for an item; nil when ctx ends or the queue is gone.
func (l *Ledger) next(ctx context.Context, find func() *queue) (*item, uint64, error) {
	for {
		if ctx.Err() != nil {
			return nil, 0, nil
		}
		l.mu.Lock()
		q := find()
		if q == nil || q.removed {
			l.mu.Unlock()
			return nil, 0, credential.ErrNotFound
		}
		due := l.fire()
		it, at := q.take(l.cfg.Now())
		if it != nil {
			n := it.n
			l.mu.Unlock()
			return it, n, nil
		}
		if at.IsZero() || !due.IsZero() && due.Before(at) {
			at = due
		}
		changed := l.changed
		wait := at.Sub(l.cfg.Now())
		l.mu.Unlock()
		var timer *time.Timer
		var fired <-chan time.Time
		if !at.IsZero() {
			timer = time.NewTimer(max(wait, 0))
			fired = timer.C
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-fired:
		}
		if timer != nil {
			timer.Stop()
		}
	}
}

// handle runs one delivery. If fn does not return (runtime.Goexit: the worker died) it is delivered again after ackWait.
func (l *Ledger) handle(ctx context.Context, find func() *queue, it *item, fn func() error) {
	err, returned := errors.New("did not return"), false
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		it.busy = false
		switch {
		case !returned:
			it.at = l.cfg.Now().Add(ackWait)
		case err == nil:
			if q := find(); q != nil {
				q.remove(it)
			}
			delete(l.ackBody, it.tag)
		case ctx.Err() == nil:
			it.at = l.cfg.Now().Add(handBack)
		}
		l.notify()
	}()
	err = fn()
	returned = true
}
