package rotatortest

import (
	"sync"

	"github.com/rekeyhq/rekey/rotators"
)

// refusesOlder wants every change by op to be a Conflict that changes nothing about v, the version that is there.
func refusesOlder(x *trial, op rotators.Op, stale, v made) {
	stale.op = op
	x.unchanged("an older op", func() {
		_, err := x.Again.Apply(x.ctx, op, stale.m)
		x.class("apply by an older op", err, rotators.Conflict)
		x.class("disable by an older op", x.Again.Disable(x.ctx, op, v.id), rotators.Conflict)
		x.class("delete by an older op", x.Again.Delete(x.ctx, op, v.id), rotators.Conflict)
		x.class("enable by an older op", x.Again.Enable(x.ctx, op, v.id), rotators.Conflict)
	})
	x.accepted("after the older op", v)
	x.rejected("the older op's secret", stale)
}

func olderOp(x *trial) {
	stale := x.compose(x.op(0, 1)) // a worker frozen before its Apply
	v := x.apply(x.op(0, 2))
	if stale.id != v.id {
		x.fail("with nothing in use it chose %q and then %q", stale.id, v.id)
	}
	refusesOlder(x, x.op(0, 1), stale, v)
}

func olderEpoch(x *trial) {
	stale := x.compose(x.op(0, 9))
	v := x.apply(x.op(1, 2))
	refusesOlder(x, x.op(0, 9), stale, v)
}

func disabledStays(x *trial) {
	v := x.apply(x.op(0, 1))
	x.ok("disable", x.Rotator.Disable(x.ctx, v.op, v.id))
	x.unchanged("an apply after its own disable", func() {
		_, err := x.Again.Apply(x.ctx, v.op, v.m)
		x.class("apply after its own disable", err, rotators.Conflict)
	})
	x.rejected("after disable", v)
	x.ok("delete", x.Rotator.Delete(x.ctx, v.op, v.id))
	_, err := x.Again.Apply(x.ctx, v.op, v.m)
	x.class("apply after its own delete", err, rotators.Conflict)
	x.rejected("after delete", v)
}

func enableWantsNewer(x *trial) {
	v := x.apply(x.op(0, 1))
	op := x.op(1, 1)
	x.ok("disable", x.Rotator.Disable(x.ctx, op, v.id))
	x.unchanged("enable", func() {
		x.class("enable by the op that disabled", x.Again.Enable(x.ctx, op, v.id), rotators.Conflict)
		x.class("enable by an older op", x.Again.Enable(x.ctx, v.op, v.id), rotators.Conflict)
	})
	x.rejected("after both", v)
}

// killBeforeApply freezes a worker before its first Apply of a slot, kills the credential, and wakes the worker.
func killBeforeApply(x *trial) {
	v := x.apply(x.op(0, 1))
	frozen := x.compose(x.op(0, 2), v)
	kill := x.op(1, 2)
	for _, id := range []rotators.VersionID{v.id, frozen.id} {
		x.ok("disable by an emergency", x.Rotator.Disable(x.ctx, kill, id))
	}
	_, err := x.Again.Apply(x.ctx, frozen.op, frozen.m)
	x.class("apply of a generation from before the emergency", err, rotators.Conflict)
	x.rejected("after the kill", v, frozen)
	if live := x.live(); len(live) > 0 {
		x.fail("live after the kill: %v", live)
	}
}

// race lets many workers try generations of one slot at once. The newest wins, whatever the order.
func race(x *trial) {
	const most = 6
	var vs []made
	for g := range most {
		vs = append(vs, x.compose(x.op(0, uint64(g+1))))
	}
	var wg sync.WaitGroup
	errs := make([]error, most)
	for i, v := range vs {
		wg.Go(func() {
			for { // a class that may be repeated is, as a worker would
				_, errs[i] = x.Again.Apply(x.ctx, v.op, v.m)
				if errs[i] == nil || x.ctx.Err() != nil || rotators.ClassOf(errs[i]) == rotators.Conflict || rotators.ClassOf(errs[i]) == rotators.Refused {
					return
				}
			}
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil && (i == most-1 || rotators.ClassOf(err) != rotators.Conflict) {
			x.fail("racing apply of generation %d: %v", i+1, err)
		}
	}
	x.accepted("the newest", vs[most-1])
	x.rejected("the older ones", vs[:most-1]...)
}
