package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

// parallel runs f(0) to f(n-1) at once, started together, and joins their errors.
func parallel(n int, f func(i int) error) error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = f(i)
		})
	}
	close(start)
	wg.Wait()
	return errors.Join(errs...)
}

var concurrentChecks = []Check{
	{Name: "of concurrent stages of one key one material wins", Run: oneMaterialWins},
	{Name: "concurrent stage and promote lose nothing", Run: nothingIsLost},
	{Name: "concurrent changes of many credentials lose nothing", Run: manyCredentials},
	{Name: "a reader never misses current", Run: readerNeverMisses},
}

// oneMaterialWins lets eight writers on four handles race for every generation. All must be told the same material, all
// their promotions are nil, and it is that material which consumers read.
func oneMaterialWins(ctx context.Context, t testing.TB, h Harness) error {
	const writers = 8
	handles := h.New(t, 4)
	from := store.Key{}
	for g := uint64(1); g <= uint64(h.promotions()); g++ {
		k := key(g)
		told := make([]store.Secret, writers)
		err := parallel(writers, func(i int) error {
			s := handles[i%len(handles)]
			draw := store.Secret{Key: k, Material: rotators.Text(map[string]string{"password": fmt.Sprintf("draw %d", i)})}
			var err error
			if told[i], err = s.Stage(ctx, draw); err != nil {
				return err
			}
			return s.Promote(ctx, k, from)
		})
		if err != nil {
			return fmt.Errorf("generation %d: %w", g, err)
		}
		c := on(ctx, handles[0])
		for i := range told {
			c.same(fmt.Sprintf("what writer %d was told", i), told[i], told[0])
		}
		c.has(store.Current, told[0])
		if c.err != nil {
			return c.err
		}
		from = k
	}
	return nil
}

// nothingIsLost swaps current and previous in one handle while another stages, discards or destroys: both must last.
func nothingIsLost(ctx context.Context, t testing.TB, h Harness) error {
	handles := h.New(t, 2)
	c := rotated(ctx, handles[0])
	current, previous := uint64(2), uint64(1)
	for i := range h.promotions() {
		next := uint64(i + 3)
		err := parallel(2, func(who int) error {
			if who == 0 {
				return handles[0].Promote(ctx, key(previous), key(current))
			}
			if _, err := handles[1].Stage(ctx, secret(key(next))); err != nil {
				return err
			}
			return handles[1].Discard(ctx, key(next-1)) // holds another key: nothing
		})
		current, previous = previous, current
		c.do(fmt.Sprintf("round %d", i), err).holds(current, next, previous)
		if c.err != nil {
			return c.err
		}
	}
	return c.err
}

func manyCredentials(ctx context.Context, t testing.TB, h Harness) error {
	const writers, generations = 12, 4
	handles := h.New(t, 3)
	return parallel(writers, func(i int) error {
		name := fmt.Sprintf("team%d/db%d", i%3, i)
		c := on(ctx, handles[i%len(handles)])
		from := store.Key{}
		for g := uint64(1); g <= generations; g++ {
			k := keyOf(name, g)
			c.stage(k).promote(k, from).has(store.Current, secret(k))
			if from.Generation > 0 {
				c.has(store.Previous, secret(from)).do("destroy", c.s.Destroy(ctx, from))
			}
			from = k
		}
		return c.err
	})
}

// readerNeverMisses reads in a tight loop while generations are promoted: every read is one whole secret, and no read goes
// back to an older one. The writer goes on until every reader has read often.
func readerNeverMisses(ctx context.Context, t testing.TB, h Harness) error {
	const readers, enough = 2, 50
	handles := h.New(t, 1+readers)
	w := on(ctx, handles[0]).stage(key(1)).promote(key(1), store.Key{})
	if w.err != nil {
		return w.err
	}
	done := make(chan struct{})
	var reading sync.WaitGroup
	reading.Add(readers)
	read := make(chan struct{})
	go func() { reading.Wait(); close(read) }()
	return parallel(1+readers, func(i int) error {
		if i == 0 {
			defer close(done)
			busy := true
			for g := uint64(2); w.err == nil && (busy || g <= uint64(h.promotions())+1); g++ {
				w.stage(key(g)).promote(key(g), key(g-1)).do("destroy", w.s.Destroy(ctx, key(g-1)))
				select {
				case <-read:
					busy = false
				default:
				}
			}
			return w.err
		}
		return readCurrent(ctx, handles[i], done, sync.OnceFunc(reading.Done), enough)
	})
}

// readCurrent reads until done, and says so by satisfied when it has read often enough or has failed.
func readCurrent(ctx context.Context, s store.Store, done <-chan struct{}, satisfied func(), enough int) error {
	defer satisfied()
	var last uint64
	for reads := 1; ; reads++ {
		select {
		case <-done:
			return nil
		default:
		}
		got, err := s.Get(ctx, id, store.Current)
		if err != nil {
			return fmt.Errorf("read %d after generation %d: %w", reads, last, err)
		}
		if got.Key.Generation < last {
			return fmt.Errorf("read %d gave generation %d after %d", reads, got.Key.Generation, last)
		}
		last = got.Key.Generation
		r := on(ctx, s)
		if r.same("current", got, secret(key(last))); r.err != nil {
			return r.err
		}
		if reads == enough {
			satisfied()
		}
	}
}
