package credential

import (
	"encoding/binary"
	"hash/fnv"
	"slices"
	"time"
)

// Limits of patience.
const (
	retryBase    = 2 * time.Second
	retryMost    = 5 * time.Minute
	urgentMost   = 15 * time.Second // during an emergency
	redoBase     = time.Minute      // after an abandoned rotation
	redoMost     = time.Hour
	failedToPark = 3 // abandoned rotations in a row
	proofTries   = 3 // refusals before a candidate counts as rejected
	announceTry  = 5 // a step that failed this often is announced, once
	overdueLeast = time.Minute
)

// backoff is base doubled per attempt up to most, less up to a fifth derived from id and attempt: the same on every worker, and
// different for each credential.
func backoff(id ID, attempt int, base, most time.Duration) time.Duration {
	d := most
	if attempt < 20 && base<<attempt < most {
		d = base << attempt
	}
	return d - Spread(id, uint64(attempt), d/5)
}

// Spread is a derived duration in [0, window): the same for the same arguments everywhere, and even over ids.
func Spread(id ID, n uint64, window time.Duration) time.Duration {
	if window <= 0 {
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(id))
	_, _ = h.Write(binary.BigEndian.AppendUint64(nil, n))
	// FNV's low bits are weak for short inputs: fold the high ones in.
	x := h.Sum64()
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	return time.Duration(x % uint64(window)) //nolint:gosec // below window, which is positive
}

// due is the next instant at which the record wants attention; zero for none.
func (r Record) due(now time.Time) time.Time {
	next := r.dueStep(now)
	if at := r.overdueAt(); !at.IsZero() && (next.IsZero() || at.Before(next)) {
		next = at
	}
	return next
}

func (r Record) dueStep(now time.Time) time.Time {
	switch {
	case r.Claim != nil:
		return r.Claim.Until
	case !r.mayStart():
		return time.Time{}
	case r.Phase == Idle && !r.Managed:
		return time.Time{}
	case r.Phase == Idle:
		return later(r.NextRotation, now, r.Spec.Every == 0 && r.Generation > 0 && r.Failed == 0)
	case r.Phase == Suspended && r.Swept:
		return time.Time{}
	case r.Phase == Draining && r.Hold:
		return time.Time{}
	case r.Phase == Draining && !r.Ending:
		return r.endingAt()
	case r.Phase == Draining:
		return r.drainEnd()
	case r.RetryAt.After(now):
		return r.RetryAt
	default:
		return now
	}
}

// later is at, or now where at is zero; zero if never.
func later(at, now time.Time, never bool) time.Time {
	switch {
	case !at.IsZero():
		return at
	case never:
		return time.Time{}
	default:
		return now
	}
}

// overdueAt is when the current version becomes overdue; zero if it was announced or there is no calendar.
func (r Record) overdueAt() time.Time {
	if r.Overdue || !r.Managed || r.Spec.Every == 0 || r.Current == nil || r.LastRotation.IsZero() {
		return time.Time{}
	}
	every := r.Spec.Every.D()
	return r.LastRotation.Add(every + r.Spec.Jitter.D() + max(every/2, overdueLeast))
}

// drainEnd is when the old version may be retired: DrainMin if every required consumer has acknowledged, else DrainMax.
func (r Record) drainEnd() time.Time {
	if replacing(&r) {
		return r.Since // an emergency ends it at once
	}
	if len(r.Lagging()) > 0 {
		return r.DrainMax
	}
	return r.DrainMin
}

// endingAt is a tenth of the overlap before its end, at most an hour.
func (r Record) endingAt() time.Time {
	end := r.drainEnd()
	start := r.Since
	return end.Add(-min(max(end.Sub(start)/10, 0), time.Hour))
}

// OverlapUntil is when the overlap ends; zero outside one.
func (r Record) OverlapUntil() time.Time {
	if r.Phase != Draining {
		return time.Time{}
	}
	return r.drainEnd()
}

// Lagging lists the required consumers that have not acknowledged the current generation.
func (r Record) Lagging() []string {
	var names []string
	for _, c := range r.Spec.Consumers {
		if _, ok := r.Acks[c.Name]; c.Required && !ok {
			names = append(names, c.Name)
		}
	}
	slices.Sort(names)
	return names
}
