package rotatortest

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/rekeyhq/rekey/rotators"
)

// Checks is the suite, in the order in which it runs.
func Checks() []Check {
	return []Check{
		{"traits are possible", nil, traitsArePossible},
		{"compose avoids what is in use", []Need{Composes}, composeAvoids},
		{"compose draws a strong secret", []Need{Composes}, composeDraws},
		{"an applied version can log in", nil, appliedLogsIn},
		{"a wrong secret is rejected", nil, wrongIsRejected},
		{"another worker sees the same", nil, anotherWorker},
		{"apply repeats", []Need{Composes}, applyRepeats},
		{"a mint does not repeat", []Need{Tags}, mintDoesNotRepeat},
		{"two mints differ", []Need{Mints}, mintsDiffer},
		{"MaxLive versions work at once", []Need{Overlap}, maxLive},
		{"one slot replaces at once", []Need{OneSlot}, oneSlot},
		{"a disabled version is refused", nil, disabledIsRefused},
		{"disable ends sessions", []Need{EndsThem}, disableEnds},
		{"disable ends only its own sessions", []Need{EndsThem, Overlap}, disableSpares},
		{"disable and delete repeat", nil, disableRepeats},
		{"enable after disable", nil, enableRevives},
		{"a deleted version stays dead", nil, deletedStaysDead},
		{"a slot is used again", []Need{Composes}, slotAgain},
		{"inspect is complete", []Need{Counts}, inspectComplete},
		{"inspect shows whose and which", []Need{Attributed}, inspectAttributes},
		{"an older op changes nothing", []Need{Fenced, Composes}, olderOp},
		{"an older epoch changes nothing", []Need{Fenced, Composes}, olderEpoch},
		{"an op that disabled does not apply again", []Need{Fenced, Composes}, disabledStays},
		{"an op that disabled does not enable", []Need{Fenced}, enableWantsNewer},
		{"a kill reaches a slot not yet applied", []Need{Fenced, Composes, Overlap}, killBeforeApply},
		{"racing workers agree", []Need{Fenced, Composes}, race},
		{"a foreign version is left alone", []Need{Strangers, Attributed}, foreignAlone},
		{"an unreachable issuer is unknown", []Need{Breaks}, unreachable},
		{"a change lost on its way has no effect", []Need{Fails}, lostOnItsWay},
		{"a lost reply is unsure", []Need{Loses}, lostReply},
		{"a cancelled call is no verdict", nil, cancelled},
		{"check finds nothing fatal", []Need{Checkable}, checkFindsNothing},
	}
}

func traitsArePossible(x *trial) {
	t := x.traits
	_, composes := x.Rotator.(rotators.Composer)
	switch {
	case t.MaxLive < 1:
		x.fail("MaxLive is %d, want at least 1", t.MaxLive)
	case t.Settle < 0 || t.Residual < 0:
		x.fail("a negative duration: settle %s, residual %s", t.Settle, t.Residual)
	case t.Tagged && !t.Minted:
		x.fail("Tagged is for minted kinds")
	case t.Minted == composes:
		x.fail("Minted is %v and it is a Composer: %v; exactly one of both is wanted", t.Minted, composes)
	case x.Again.Traits() != t:
		x.fail("another rotator on the same issuer has other traits")
	}
}

func composeAvoids(x *trial) {
	c := x.Rotator.(rotators.Composer)
	x.unchanged("compose", func() {
		first := x.compose(x.op(0, 1))
		again := x.compose(x.op(0, 1))
		if first.id == "" || first.id != again.id {
			x.fail("the same op and slots give %q and then %q", first.id, again.id)
		}
		if first.m.Equal(again.m) {
			x.fail("two secrets are the same")
		}
		var used []made
		for range x.traits.MaxLive {
			v := x.compose(x.op(0, 1), used...)
			if x.traits.MaxLive > 1 && slices.Contains(ids(used), v.id) {
				x.fail("it chose %q, which is in use", v.id)
			}
			used = append(used, v)
		}
		if x.traits.MaxLive > 1 {
			_, _, err := c.Compose(x.op(0, 1), ids(used), strings.NewReader(strings.Repeat("x", 4096)))
			x.class("compose with every slot in use", err, rotators.Refused)
		}
	})
}

func composeDraws(x *trial) {
	c := x.Rotator.(rotators.Composer)
	_, _, err := c.Compose(x.op(0, 1), nil, strings.NewReader("abc"))
	x.class("compose from a source that ends", err, rotators.Transient, rotators.Refused)
	seen := map[string]bool{}
	for range 64 {
		v := x.compose(x.op(0, 1))
		strong := false
		for _, name := range secretFields(v.m) {
			secret := string(v.m.Reveal(name))
			if seen[secret] {
				x.fail("two secrets are the same")
			}
			seen[secret], strong = true, strong || len(secret) >= 32
		}
		if !strong {
			x.fail("no secret field has 32 bytes: %v", v.m.Names())
		}
	}
}

func appliedLogsIn(x *trial) {
	v := x.apply(x.op(0, 1))
	x.accepted("after apply", v)
}

func wrongIsRejected(x *trial) {
	v := x.apply(x.op(0, 1))
	x.accepted("after apply", v)
	x.rejected("a wrong secret", wrong(v))
	x.accepted("after a wrong secret", v)
}

func anotherWorker(x *trial) {
	v := x.apply(x.op(0, 1))
	x.accepted("after apply", v)
	if got := x.verdict(x.Again, v); got != rotators.Accepted {
		x.fail("another worker's login is %s", got)
	}
	x.ok("disable by another worker", x.Again.Disable(x.ctx, x.op(0, 2), v.id))
	x.rejected("after another worker disabled it", v)
}

func applyRepeats(x *trial) {
	v := x.apply(x.op(0, 1))
	before := x.live()
	for range 2 {
		again, err := x.Again.Apply(x.ctx, v.op, v.m)
		x.ok("apply again", err)
		if again.ID != v.id {
			x.fail("apply again wrote %q, and first %q", again.ID, v.id)
		}
	}
	x.accepted("after three applies", v)
	if after := x.live(); !slices.Equal(before, after) {
		x.fail("live versions were %v and are %v", before, after)
	}
}

func mintDoesNotRepeat(x *trial) {
	v := x.apply(x.op(0, 1))
	x.unchanged("a repeated mint", func() {
		_, err := x.Again.Apply(x.ctx, v.op, rotators.Material{})
		x.class("mint again", err, rotators.Unsure)
	})
	x.accepted("after a repeated mint", v)
}

func mintsDiffer(x *trial) {
	v := x.apply(x.op(0, 1))
	x.ok("delete", x.Rotator.Delete(x.ctx, x.op(0, 2), v.id))
	w := x.apply(x.op(0, 2))
	if v.id == w.id || v.m.Equal(w.m) {
		x.fail("two mints gave ids %q and %q, and equal secrets: %v", v.id, w.id, v.m.Equal(w.m))
	}
}

// several applies MaxLive versions, one per generation.
func several(x *trial) []made {
	var vs []made
	for i := range x.traits.MaxLive {
		vs = append(vs, x.apply(x.op(0, uint64(i+1)), vs...))
	}
	return vs
}

func maxLive(x *trial) {
	vs := several(x)
	x.accepted("with MaxLive versions", vs...)
	seen := map[rotators.VersionID]bool{}
	for _, v := range vs {
		if seen[v.id] {
			x.fail("two generations are in %q", v.id)
		}
		seen[v.id] = true
	}
}

func oneSlot(x *trial) {
	v := x.apply(x.op(0, 1))
	var old Session
	if x.Open != nil {
		old = x.open(v)
	}
	w := x.apply(x.op(0, 2), v)
	x.accepted("the new secret", w)
	x.rejected("the replaced secret", v)
	if old != nil && x.traits.Kills && old.Alive() {
		x.fail("a session of the replaced secret is alive")
	}
}

func disabledIsRefused(x *trial) {
	vs := several(x)
	x.accepted("before disable", vs...)
	x.ok("disable", x.Rotator.Disable(x.ctx, vs[len(vs)-1].op, vs[0].id))
	x.rejected("after disable", vs[0])
	x.accepted("the other versions", vs[1:]...)
}

func disableEnds(x *trial) {
	v := x.apply(x.op(0, 1))
	var open []Session
	for range 3 {
		open = append(open, x.open(v))
	}
	x.ok("disable", x.Rotator.Disable(x.ctx, x.op(0, 2), v.id))
	for i, s := range open {
		if s.Alive() {
			x.fail("session %d is alive after Disable returned", i+1)
		}
	}
}

func disableSpares(x *trial) {
	vs := several(x)
	spared := x.open(vs[1])
	x.ok("disable", x.Rotator.Disable(x.ctx, vs[len(vs)-1].op, vs[0].id))
	if !spared.Alive() {
		x.fail("disabling one version ended a session of another")
	}
}

func disableRepeats(x *trial) {
	v := x.apply(x.op(0, 1))
	for _, r := range []rotators.Rotator{x.Rotator, x.Again, x.Rotator} {
		x.ok("disable", r.Disable(x.ctx, x.op(0, 2), v.id))
	}
	x.rejected("after disable", v)
	for _, r := range []rotators.Rotator{x.Rotator, x.Again, x.Rotator} {
		x.ok("delete", r.Delete(x.ctx, x.op(0, 2), v.id))
	}
	x.ok("disable what is deleted", x.Rotator.Disable(x.ctx, x.op(0, 2), v.id))
	x.rejected("after delete", v)
}

func enableRevives(x *trial) {
	v := x.apply(x.op(0, 1))
	x.accepted("after apply", v)
	x.ok("disable", x.Rotator.Disable(x.ctx, x.op(0, 2), v.id))
	x.rejected("after disable", v)
	for range 2 {
		x.ok("enable by a newer op", x.Again.Enable(x.ctx, x.op(0, 3), v.id))
	}
	x.accepted("after enable", v)
}

func deletedStaysDead(x *trial) {
	vs := several(x)
	x.accepted("before delete", vs...)
	newest := vs[len(vs)-1]
	x.ok("delete", x.Rotator.Delete(x.ctx, newest.op, vs[0].id)) // without a Disable before it
	x.rejected("after delete", vs[0])
	x.accepted("the other versions", vs[1:]...)
	if info, ok := x.census()[vs[0].id]; ok && info.Enabled {
		x.fail("inspect says that the deleted version is enabled")
	}
	next := x.op(0, newest.op.Generation+1)
	_ = x.noted(x.Rotator.Enable(x.ctx, next, vs[0].id)) // an error or not: there is no secret to come back
	x.rejected("after delete and enable", vs[0])
}

func slotAgain(x *trial) {
	vs := several(x)
	newest := vs[len(vs)-1]
	x.ok("disable", x.Rotator.Disable(x.ctx, newest.op, vs[0].id))
	x.ok("delete", x.Rotator.Delete(x.ctx, newest.op, vs[0].id))
	again := x.apply(x.op(0, newest.op.Generation+1), vs[1:]...)
	if again.id != vs[0].id {
		x.fail("the free slot is %q, and it chose %q", vs[0].id, again.id)
	}
	x.accepted("the slot's new secret", again)
	x.rejected("the slot's old secret", vs[0])
}

func inspectComplete(x *trial) {
	if live := x.live(); len(live) != 0 {
		x.fail("a new issuer has live versions: %v", live)
	}
	vs := several(x)
	want := ids(vs)
	slices.Sort(want)
	if live := x.live(); !slices.Equal(live, want) {
		x.fail("live are %v, want %v", live, want)
	}
	x.ok("disable", x.Rotator.Disable(x.ctx, vs[len(vs)-1].op, vs[0].id))
	if live := x.live(); slices.Contains(live, vs[0].id) || len(live) != len(vs)-1 {
		x.fail("after disabling %q live are %v", vs[0].id, live)
	}
}

func inspectAttributes(x *trial) {
	vs := several(x)
	census := x.census()
	for _, v := range vs {
		i := census[v.id]
		if !i.Ours || i.Generation != v.op.Generation || i.Epoch != v.op.Epoch || i.OpID != v.op.ID {
			x.fail("generation %d shows as %+v", v.op.Generation, i)
		}
	}
}

func foreignAlone(x *trial) {
	id, works := x.Foreign()
	if info, ok := x.census()[id]; !ok || info.Ours || !info.Enabled {
		x.fail("a foreign version shows as %+v, %v", info, ok)
	}
	x.unchanged("meeting a foreign version", func() {
		if !x.traits.Minted {
			v := x.compose(x.op(0, 1))
			if v.id == id {
				_, err := x.Rotator.Apply(x.ctx, v.op, v.m)
				x.class("apply over a foreign version", err, rotators.Refused)
			}
		}
		x.class("disable a foreign version", x.Rotator.Disable(x.ctx, x.op(1, 1), id), rotators.Refused)
		x.class("delete a foreign version", x.Rotator.Delete(x.ctx, x.op(1, 1), id), rotators.Refused)
	})
	if !works() {
		x.fail("the foreign version does not work any more")
	}
}

func unreachable(x *trial) {
	v := x.apply(x.op(0, 1))
	x.accepted("before", v)
	next := x.compose(x.op(0, 2), v)
	restore := x.Break()
	// A login that never reached the issuer says nothing about the secret.
	if got := x.verdict(x.Rotator, v); got != rotators.Unknown {
		x.fail("the verdict without an issuer is %s", got)
	}
	may := []rotators.Class{rotators.Transient, rotators.Unsure, rotators.Throttled}
	_, err := x.Rotator.Apply(x.ctx, next.op, next.m)
	x.class("apply without an issuer", err, may...)
	x.class("disable without an issuer", x.Rotator.Disable(x.ctx, next.op, v.id), may...)
	_, err = x.Rotator.Inspect(x.ctx)
	x.class("inspect without an issuer", err, may...)
	restore()
	x.accepted("after", v)
}

func lostOnItsWay(x *trial) {
	v := x.apply(x.op(0, 1))
	x.unchanged("a change that never arrived", func() {
		x.FailBefore()
		x.class("disable", x.Rotator.Disable(x.ctx, x.op(0, 2), v.id), rotators.Transient, rotators.Unsure)
	})
	x.accepted("after it", v)
	x.ok("disable again", x.Rotator.Disable(x.ctx, x.op(0, 2), v.id))
	x.rejected("after disable", v)
}

func lostReply(x *trial) {
	before := x.live()
	v := x.compose(x.op(0, 1))
	x.LoseReply()
	_, err := x.Rotator.Apply(x.ctx, v.op, v.m)
	x.class("apply whose reply is lost", err, rotators.Unsure)
	if !x.traits.Minted {
		x.accepted("after an apply whose reply was lost", v)
		x.accepted("after its repeat", x.applied(v))
	} else if live := x.live(); len(live) != len(before)+1 {
		x.fail("the harness lost the effect, not the reply: live were %v and are %v", before, live)
	} else if x.traits.Tagged {
		i := x.census()[live[0]]
		if !i.Ours || i.OpID != v.op.ID {
			x.fail("a lost mint cannot be attributed: %+v", i)
		}
	}
	id := x.live()[0]
	x.LoseReply()
	x.class("disable whose reply is lost", x.Rotator.Disable(x.ctx, x.op(0, 2), id), rotators.Unsure)
	x.ok("disable again", x.Again.Disable(x.ctx, x.op(0, 2), id))
	if live := x.live(); slices.Contains(live, id) {
		x.fail("%q is live after disable", id)
	}
}

func cancelled(x *trial) {
	v := x.apply(x.op(0, 1))
	x.accepted("before", v)
	next := x.compose(x.op(0, 2), v)
	ctx, cancel := context.WithCancel(x.ctx)
	cancel()
	x.unchanged("a cancelled call", func() {
		got, err := x.Rotator.Prove(ctx, v.op, v.id, v.m)
		_ = x.noted(err)
		if got != rotators.Unknown || err == nil {
			x.fail("the verdict of a cancelled login is %s with error %v", got, err)
		}
		if !errors.Is(err, context.Canceled) {
			x.fail("the error of a cancelled login hides that: %v", err)
		}
		may := []rotators.Class{rotators.Transient, rotators.Unsure}
		_, err = x.Rotator.Apply(ctx, next.op, next.m)
		x.class("a cancelled apply", err, may...)
		x.class("a cancelled disable", x.Rotator.Disable(ctx, next.op, v.id), may...)
		x.class("a cancelled delete", x.Rotator.Delete(ctx, next.op, v.id), may...)
		_, err = x.Rotator.Inspect(ctx)
		x.class("a cancelled inspect", err, may...)
	})
	x.accepted("after", v)
}

func checkFindsNothing(x *trial) {
	c := x.Rotator.(rotators.Checker)
	look := func() {
		found, err := c.Check(x.ctx)
		x.ok("check", err)
		for _, f := range found {
			if f.Fatal {
				x.fail("a fatal finding on a sound issuer: %s (%s)", f.Message, f.Remedy)
			}
		}
	}
	x.unchanged("check", look)
	x.apply(x.op(0, 1))
	x.unchanged("check", look)
}
