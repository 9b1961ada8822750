package storetest

import (
	"context"
	"fmt"
	"testing"

	"github.com/rekeyhq/rekey/integration/store"
)

// generations are what the three stages hold.
type generations struct{ current, pending, previous uint64 }

// dying makes a check that kills one call at every point. Afterwards a new process finds the state before or after it,
// and the repeated call succeeds and has the whole effect.
func dying(name string, prepare func(c *scenario), call func(ctx context.Context, s store.Store) error, before, after generations) Check {
	return Check{Name: name, Crash: true, Run: func(ctx context.Context, t testing.TB, h Harness) error {
		died := 0
		for _, point := range h.Points {
			s, arm, reopen := h.Dying(t, point)
			c := on(ctx, s)
			if prepare(c); c.err != nil {
				return fmt.Errorf("prepare: %w", c.err)
			}
			arm()
			err := survive(func() error { return call(ctx, s) })
			if err != nil {
				died++
			}
			fresh := reopen()
			b := on(ctx, fresh).holds(before.current, before.pending, before.previous)
			a := on(ctx, fresh).holds(after.current, after.pending, after.previous)
			switch {
			case err == nil && a.err != nil:
				return fmt.Errorf("point %q was not reached, and the call had no effect: %w", point, a.err)
			case a.err != nil && b.err != nil:
				return fmt.Errorf("dead at %q: the state is neither before (%w) nor after (%w)", point, b.err, a.err)
			}
			if err := call(ctx, fresh); err != nil {
				return fmt.Errorf("dead at %q: the repeat failed: %w", point, err)
			}
			if a := on(ctx, reopen()).holds(after.current, after.pending, after.previous); a.err != nil {
				return fmt.Errorf("dead at %q: after the repeat: %w", point, a.err)
			}
		}
		if died == 0 {
			return fmt.Errorf("the call came to none of the points %q", h.Points)
		}
		return nil
	}}
}

// survive turns a panic into an error.
func survive(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("died: %v", r)
		}
	}()
	return f()
}

func prepared(c *scenario) { c.err = rotated(c.ctx, c.s).stage(key(3)).err }

var crashChecks = []Check{
	dying("death in the first stage", func(*scenario) {},
		func(ctx context.Context, s store.Store) error { _, err := s.Stage(ctx, secret(key(1))); return err },
		generations{0, 0, 0}, generations{0, 1, 0}),
	dying("death in stage", prepared,
		func(ctx context.Context, s store.Store) error { _, err := s.Stage(ctx, secret(key(4))); return err },
		generations{2, 3, 1}, generations{2, 4, 1}),
	dying("death in the first promote", func(c *scenario) { c.stage(key(1)) },
		func(ctx context.Context, s store.Store) error { return s.Promote(ctx, key(1), store.Key{}) },
		generations{0, 1, 0}, generations{1, 0, 0}),
	dying("death in promote", prepared,
		func(ctx context.Context, s store.Store) error { return s.Promote(ctx, key(3), key(2)) },
		generations{2, 3, 1}, generations{3, 0, 2}),
	dying("death in promote of previous", prepared,
		func(ctx context.Context, s store.Store) error { return s.Promote(ctx, key(1), key(2)) },
		generations{2, 3, 1}, generations{1, 3, 2}),
	dying("death in discard", prepared,
		func(ctx context.Context, s store.Store) error { return s.Discard(ctx, key(3)) },
		generations{2, 3, 1}, generations{2, 0, 1}),
	dying("death in discard of the only secret", func(c *scenario) { c.stage(key(1)) },
		func(ctx context.Context, s store.Store) error { return s.Discard(ctx, key(1)) },
		generations{0, 1, 0}, generations{0, 0, 0}),
	dying("death in destroy", prepared,
		func(ctx context.Context, s store.Store) error { return s.Destroy(ctx, key(1)) },
		generations{2, 3, 1}, generations{2, 3, 0}),
	dying("death in writable", prepared,
		func(ctx context.Context, s store.Store) error { return s.Writable(ctx, id) },
		generations{2, 3, 1}, generations{2, 3, 1}),
}
