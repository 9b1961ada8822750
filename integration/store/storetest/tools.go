package storetest

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

const id = "orders/db"

var incarnation = uuid.MustParse("0d6f3f3e-5a52-4a7e-8f7c-5d4f2a1b9c10")

// key is the key of one generation of id.
func key(generation uint64) store.Key { return keyOf(id, generation) }

func keyOf(credential string, generation uint64) store.Key {
	return store.Key{
		Credential: credential, Generation: generation,
		OpID:    rotators.NewOpID(incarnation, credential, generation),
		Version: rotators.VersionID(fmt.Sprintf("role_%d", generation%2)),
	}
}

// foreign is a key of the same generation by another op.
func foreign(generation uint64) store.Key {
	k := key(generation)
	k.OpID = rotators.NewOpID(uuid.Max, id, generation)
	return k
}

// secret is what the checks store under k: the password tells which generation it is.
func secret(k store.Key) store.Secret {
	return store.Secret{Key: k, Material: rotators.Text(map[string]string{
		rotators.FieldUsername: string(k.Version), rotators.FieldPassword: password(k),
	})}
}

func password(k store.Key) string { return fmt.Sprintf("password of %s %s", k, k.OpID) }

// scenario runs the steps of one check against one handle and keeps the first thing that went wrong.
type scenario struct {
	ctx context.Context
	s   store.Store
	err error
}

func on(ctx context.Context, s store.Store) *scenario { return &scenario{ctx: ctx, s: s} }

func (c *scenario) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf(format, args...)
	}
}

// do wants nil.
func (c *scenario) do(what string, err error) *scenario {
	if err != nil {
		c.fail("%s: %w", what, err)
	}
	return c
}

// refuse wants a fault of the class.
func (c *scenario) refuse(what string, want rotators.Class, err error) *scenario {
	var f *rotators.Fault
	switch {
	case err == nil:
		c.fail("%s succeeded, want %s", what, want)
	case !errors.As(err, &f):
		c.fail("%s: the error is not a fault: %w", what, err)
	case f.Class != want:
		c.fail("%s is %s, want %s: %w", what, f.Class, want, err)
	}
	return c
}

func (c *scenario) stage(k store.Key) *scenario { return c.stageSecret(secret(k)) }

func (c *scenario) stageSecret(n store.Secret) *scenario {
	got, err := c.s.Stage(c.ctx, n)
	c.do("stage "+n.Key.String(), err)
	if err == nil {
		c.same("the secret that Stage returned", got, n)
	}
	return c
}

func (c *scenario) promote(to, from store.Key) *scenario {
	return c.do(fmt.Sprintf("promote %s from %s", to, from), c.s.Promote(c.ctx, to, from))
}

func (c *scenario) same(what string, got, want store.Secret) {
	if got.Key != want.Key {
		c.fail("%s has key %+v, want %+v", what, got.Key, want.Key)
	}
	if !got.Material.Equal(want.Material) {
		c.fail("%s under %s has other material: fields %q, want %q, or other bytes", what, want.Key, got.Material.Names(), want.Material.Names())
	}
}

// holds wants exactly these generations in current, pending and previous; 0 is an empty stage.
func (c *scenario) holds(current, pending, previous uint64) *scenario {
	for _, w := range []struct {
		stage      store.Stage
		generation uint64
	}{{store.Current, current}, {store.Pending, pending}, {store.Previous, previous}} {
		if w.generation == 0 {
			c.empty(w.stage)
		} else {
			c.has(w.stage, secret(key(w.generation)))
		}
	}
	return c
}

func (c *scenario) has(stage store.Stage, want store.Secret) *scenario {
	got, err := c.s.Get(c.ctx, want.Key.Credential, stage)
	c.do("get "+string(stage), err)
	if err == nil {
		c.same(string(stage), got, want)
	}
	return c
}

func (c *scenario) empty(stage store.Stage) *scenario {
	got, err := c.s.Get(c.ctx, id, stage)
	if err == nil {
		c.fail("%s holds %s, want it empty", stage, got.Key)
		return c
	}
	c.refuse("get empty "+string(stage), rotators.Refused, err)
	if !errors.Is(err, store.ErrNotFound) {
		c.fail("get empty %s: errors.Is does not find ErrNotFound: %w", stage, err)
	}
	return c
}

// rotated is the usual start: generation 2 is current, 1 is previous.
func rotated(ctx context.Context, s store.Store) *scenario {
	return on(ctx, s).stage(key(1)).promote(key(1), store.Key{}).stage(key(2)).promote(key(2), key(1))
}
