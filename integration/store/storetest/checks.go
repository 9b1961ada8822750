package storetest

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

// simple makes a check that needs one handle.
func simple(name string, run func(c *scenario)) Check {
	return Check{Name: name, Run: func(ctx context.Context, t testing.TB, h Harness) error {
		c := on(ctx, h.one(t))
		run(c)
		return c.err
	}}
}

func other(k store.Key) store.Secret {
	return store.Secret{Key: k, Material: rotators.Text(map[string]string{rotators.FieldPassword: "another draw"})}
}

var stageChecks = []Check{
	simple("an empty store has no secret", func(c *scenario) { c.holds(0, 0, 0) }),
	simple("a staged secret is pending and not current", func(c *scenario) { c.stage(key(1)).holds(0, 1, 0) }),
	simple("stage repeated keeps the first material", func(c *scenario) {
		c.stage(key(1)).stage(key(1))
		got, err := c.s.Stage(c.ctx, other(key(1)))
		c.do("stage again with other material", err).same("the repeat's result", got, secret(key(1)))
		c.holds(0, 1, 0)
	}),
	simple("stage keeps the issuer's version id that was first", func(c *scenario) {
		c.stage(key(1))
		n := secret(key(1))
		n.Key.Version = "another_role"
		got, err := c.s.Stage(c.ctx, n)
		c.do("stage again with another version id", err).same("the repeat's result", got, secret(key(1)))
		c.holds(0, 1, 0)
	}),
	simple("stage replaces a lower generation", func(c *scenario) { c.stage(key(1)).stage(key(3)).holds(0, 3, 0) }),
	simple("stage below pending is a conflict", func(c *scenario) {
		c.stage(key(3))
		_, err := c.s.Stage(c.ctx, secret(key(2)))
		c.refuse("stage 2 over 3", rotators.Conflict, err).holds(0, 3, 0)
	}),
	simple("stage of the same generation by another op is a conflict", func(c *scenario) {
		c.stage(key(3))
		_, err := c.s.Stage(c.ctx, secret(foreign(3)))
		c.refuse("stage", rotators.Conflict, err).holds(0, 3, 0)
	}),
	simple("stage at or below current is a conflict", func(c *scenario) {
		rotated(c.ctx, c.s)
		_, err := c.s.Stage(c.ctx, secret(foreign(2)))
		c.refuse("stage 2 of another op over current 2", rotators.Conflict, err)
		_, err = c.s.Stage(c.ctx, secret(foreign(1)))
		c.refuse("stage 1 over current 2", rotators.Conflict, err).holds(2, 0, 1)
	}),
	simple("stage of what is promoted already returns it", func(c *scenario) {
		rotated(c.ctx, c.s)
		for _, g := range []uint64{2, 1} {
			got, err := c.s.Stage(c.ctx, other(key(g)))
			c.do("stage again", err).same("the repeat's result", got, secret(key(g)))
		}
		c.holds(2, 0, 1)
	}),
	simple("stage refuses what names nothing", func(c *scenario) {
		for name, n := range map[string]store.Secret{
			"generation 0": secret(store.Key{Credential: id, OpID: uuid.Max}),
			"no op":        secret(store.Key{Credential: id, Generation: 1}),
			"no fields":    {Key: key(1)},
		} {
			_, err := c.s.Stage(c.ctx, n)
			c.refuse("stage with "+name, rotators.Refused, err)
		}
		c.holds(0, 0, 0)
	}),
	simple("bad credential ids are refused", func(c *scenario) {
		for _, bad := range []string{"", "orders", "orders/", "/db", "a/b/c", "../../etc/passwd", "orders/..", "Orders/db", "orders/d b", "orders/*", "orders/db.age", "orders/" + strings.Repeat("x", 300), "orders/db\x00", "orders/db\n"} {
			_, err := c.s.Stage(c.ctx, secret(keyOf(bad, 1)))
			c.refuse(fmt.Sprintf("stage %q", bad), rotators.Refused, err)
			c.refuse(fmt.Sprintf("promote %q", bad), rotators.Refused, c.s.Promote(c.ctx, keyOf(bad, 1), store.Key{}))
			_, err = c.s.Get(c.ctx, bad, store.Current)
			c.refuse(fmt.Sprintf("get %q", bad), rotators.Refused, err)
			c.refuse(fmt.Sprintf("writable %q", bad), rotators.Refused, c.s.Writable(c.ctx, bad))
		}
	}),
	simple("an unknown stage is refused", func(c *scenario) {
		c.stage(key(1))
		_, err := c.s.Get(c.ctx, id, "next")
		c.refuse("get next", rotators.Refused, err)
	}),
}

var promoteChecks = []Check{
	simple("promote from nothing", func(c *scenario) { c.stage(key(1)).promote(key(1), store.Key{}).holds(1, 0, 0) }),
	simple("promote keeps what was current as previous", func(c *scenario) {
		c.stage(key(1)).promote(key(1), store.Key{}).stage(key(2)).holds(1, 2, 0).promote(key(2), key(1)).holds(2, 0, 1)
	}),
	simple("promote repeated is nil and changes nothing", func(c *scenario) {
		rotated(c.ctx, c.s)
		c.promote(key(2), key(1)).promote(key(2), key(1)).holds(2, 0, 1)
		c.stage(key(3)).promote(key(2), key(1)).holds(2, 3, 1)
	}),
	simple("promote of what is nowhere is a conflict", func(c *scenario) {
		c.refuse("promote in an empty store", rotators.Conflict, c.s.Promote(c.ctx, key(1), store.Key{})).holds(0, 0, 0)
		c.stage(key(1)).promote(key(1), store.Key{}).stage(key(2))
		c.refuse("promote 3", rotators.Conflict, c.s.Promote(c.ctx, key(3), key(1))).holds(1, 2, 0)
		c.refuse("promote 2 of another op", rotators.Conflict, c.s.Promote(c.ctx, foreign(2), key(1))).holds(1, 2, 0)
	}),
	simple("promote over a foreign current is a conflict", func(c *scenario) {
		rotated(c.ctx, c.s)
		c.stage(key(4))
		for _, from := range []store.Key{{}, key(1), key(3), foreign(2)} {
			c.refuse("promote 4 from "+from.String(), rotators.Conflict, c.s.Promote(c.ctx, key(4), from))
		}
		c.holds(2, 4, 1)
	}),
	simple("promote from something over an empty current is a conflict", func(c *scenario) {
		c.stage(key(2))
		c.refuse("promote 2 from 1", rotators.Conflict, c.s.Promote(c.ctx, key(2), key(1))).holds(0, 2, 0)
	}),
	simple("promote of previous swaps the two and keeps pending", func(c *scenario) {
		rotated(c.ctx, c.s)
		c.stage(key(3)).promote(key(1), key(2)).holds(1, 3, 2).promote(key(1), key(2)).holds(1, 3, 2).promote(key(2), key(1)).holds(2, 3, 1)
	}),
	simple("ten generations in a row", func(c *scenario) {
		c.stage(key(1)).promote(key(1), store.Key{})
		for g := uint64(2); g <= 10; g++ {
			c.stage(key(g)).promote(key(g), key(g-1)).holds(g, 0, g-1)
			c.do("destroy", c.s.Destroy(c.ctx, key(g-1))).holds(g, 0, 0)
		}
	}),
	simple("credentials do not touch each other", func(c *scenario) {
		ids := []string{"a/b", "a/b-c", "a-b/c", "a/b_c", "a_b/c", "ab/c", "a/bc", "a/c", "b/a"}
		for i, name := range ids {
			k := keyOf(name, uint64(i+1))
			c.stage(k).promote(k, store.Key{})
		}
		for i, name := range ids {
			k := keyOf(name, uint64(i+1))
			c.has(store.Current, secret(k)).stage(keyOf(name, uint64(i+20)))
		}
		c.do("discard", c.s.Discard(c.ctx, keyOf("a/b", 20)))
		for i, name := range ids[1:] {
			c.has(store.Pending, secret(keyOf(name, uint64(i+21))))
		}
		c.refuse("promote one credential over another", rotators.Refused, c.s.Promote(c.ctx, keyOf("a/c", 27), keyOf("b/a", 9)))
	}),
}

var removeChecks = []Check{
	simple("discard removes pending by key and may be repeated", func(c *scenario) {
		rotated(c.ctx, c.s)
		c.stage(key(3))
		for _, k := range []store.Key{key(2), key(4), foreign(3), key(1)} {
			c.do("discard another key", c.s.Discard(c.ctx, k)).holds(2, 3, 1)
		}
		c.do("discard", c.s.Discard(c.ctx, key(3))).holds(2, 0, 1)
		c.do("discard again", c.s.Discard(c.ctx, key(3))).holds(2, 0, 1)
		c.stage(key(4)).holds(2, 4, 1)
	}),
	simple("destroy removes previous by key and may be repeated", func(c *scenario) {
		rotated(c.ctx, c.s)
		c.stage(key(3))
		for _, k := range []store.Key{key(2), key(3), foreign(1)} {
			c.do("destroy another key", c.s.Destroy(c.ctx, k)).holds(2, 3, 1)
		}
		c.do("destroy", c.s.Destroy(c.ctx, key(1))).holds(2, 3, 0)
		c.do("destroy again", c.s.Destroy(c.ctx, key(1))).holds(2, 3, 0)
		c.refuse("promote what was destroyed", rotators.Conflict, c.s.Promote(c.ctx, key(1), key(2))).holds(2, 3, 0)
	}),
	simple("discard of the only secret leaves an empty store", func(c *scenario) {
		c.stage(key(1)).do("discard", c.s.Discard(c.ctx, key(1))).holds(0, 0, 0)
		c.do("discard again", c.s.Discard(c.ctx, key(1))).stage(key(2)).holds(0, 2, 0)
	}),
	simple("discard and destroy in an empty store are nil", func(c *scenario) {
		c.do("discard", c.s.Discard(c.ctx, key(1))).do("destroy", c.s.Destroy(c.ctx, key(1))).holds(0, 0, 0)
	}),
	simple("writable leaves nothing behind", func(c *scenario) {
		c.do("writable in an empty store", c.s.Writable(c.ctx, id)).holds(0, 0, 0)
		rotated(c.ctx, c.s)
		c.do("writable", c.s.Writable(c.ctx, id)).holds(2, 0, 1)
		c.stage(key(3)).do("writable", c.s.Writable(c.ctx, id)).holds(2, 3, 1)
	}),
	simple("a cancelled context changes nothing", func(c *scenario) {
		rotated(c.ctx, c.s)
		ctx, cancel := context.WithCancel(c.ctx)
		cancel()
		if _, err := c.s.Stage(ctx, secret(key(3))); err == nil {
			c.fail("stage succeeded")
		}
		if err := c.s.Promote(ctx, key(1), key(2)); err == nil {
			c.fail("promote succeeded")
		}
		if err := c.s.Destroy(ctx, key(1)); err == nil {
			c.fail("destroy succeeded")
		}
		c.holds(2, 0, 1)
	}),
	simple("references differ and hold no secret", func(c *scenario) {
		rotated(c.ctx, c.s)
		a, b := c.s.Reference(id), c.s.Reference("orders/other")
		if a == "" || a == b || strings.Contains(a, password(key(2))) {
			c.fail("references %q and %q", a, b)
		}
		if again := c.s.Reference(id); again != a {
			c.fail("the reference changed from %q to %q", a, again)
		}
	}),
	simple("errors hold no secret", func(c *scenario) {
		rotated(c.ctx, c.s)
		_, err := c.s.Stage(c.ctx, secret(foreign(1)))
		for _, err := range []error{err, c.s.Promote(c.ctx, key(9), key(2)), c.s.Promote(c.ctx, key(1), key(9))} {
			if err == nil {
				c.fail("want errors")
				continue
			}
			for _, k := range []store.Key{key(1), key(2), foreign(1)} {
				if strings.Contains(fmt.Sprintf("%v %+v", err, err), password(k)) {
					c.fail("an error holds a password")
				}
			}
		}
	}),
}

var valueChecks = []Check{
	simple("binary values come back as they were", func(c *scenario) {
		all := make([]byte, 256)
		for i := range all {
			all[i] = byte(i)
		}
		n := store.Secret{Key: key(1), Material: rotators.NewMaterial(map[string][]byte{
			"all": all, "zeros": make([]byte, 100), "empty": {}, "newline": []byte("\n\r\n"), "quote": []byte(`"\'{}<&>`),
			"utf16": {0xff, 0xfe, 0x41, 0x00}, "cut": {0xe2, 0x82},
		})}
		c.stageSecret(n).has(store.Pending, n).promote(key(1), store.Key{}).has(store.Current, n)
	}),
	simple("many fields come back", func(c *scenario) {
		fields := map[string]string{"schlüssel": "ü", "with space": " ", "a.b/c": "d", "UPPER": "upper", "upper": "lower"}
		for i := range 200 {
			fields[fmt.Sprintf("field_%03d", i)] = strings.Repeat("v", i)
		}
		n := store.Secret{Key: key(1), Material: rotators.Text(fields)}
		c.stageSecret(n).has(store.Pending, n)
	}),
	{Name: "large values come back", Run: func(ctx context.Context, t testing.TB, h Harness) error {
		c := on(ctx, h.one(t))
		secrets := make([]store.Secret, 3)
		for i := range secrets {
			v := bytes.Repeat([]byte{byte(i), 0xff, 'x'}, h.maxValue()/3+1)[:h.maxValue()]
			secrets[i] = store.Secret{Key: key(uint64(i + 1)), Material: rotators.NewMaterial(map[string][]byte{"blob": v})}
		}
		c.stageSecret(secrets[0]).promote(key(1), store.Key{}).stageSecret(secrets[1]).promote(key(2), key(1)).stageSecret(secrets[2])
		c.has(store.Current, secrets[1]).has(store.Pending, secrets[2]).has(store.Previous, secrets[0])
		return c.err
	}},
	simple("the caller's changes do not reach the store", func(c *scenario) {
		c.stage(key(1))
		got, err := c.s.Get(c.ctx, id, store.Pending)
		c.do("get", err)
		clear(got.Material.Reveal(rotators.FieldPassword))
		c.holds(0, 1, 0)
	}),
	{Name: "another handle sees every change", Run: func(ctx context.Context, t testing.TB, h Harness) error {
		handles := h.New(t, 3)
		a, b, r := on(ctx, handles[0]), on(ctx, handles[1]), on(ctx, handles[2])
		a.stage(key(1))
		r.holds(0, 1, 0)
		b.promote(key(1), store.Key{})
		r.holds(1, 0, 0)
		b.stage(key(2))
		a.promote(key(2), key(1))
		r.holds(2, 0, 1)
		b.do("destroy", b.s.Destroy(ctx, key(1)))
		r.holds(2, 0, 0)
		for _, c := range []*scenario{a, b, r} {
			if c.err != nil {
				return c.err
			}
		}
		return nil
	}},
}
