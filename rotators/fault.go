package rotators

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Class says what may be done after a failure.
type Class int

// The zero value is Unsure, so that an error nobody classified is treated with the most care.
const (
	Unsure    Class = iota // the effect may exist: inspect or prove before anything is repeated
	Transient              // no effect: retry
	Throttled              // no effect: retry after RetryAfter
	Conflict               // the issuer or the store holds something newer: reload and plan again
	Refused                // never succeeds unchanged: park for a human
)

func (c Class) String() string {
	switch c {
	case Transient:
		return "transient"
	case Throttled:
		return "throttled"
	case Conflict:
		return "conflict"
	case Refused:
		return "refused"
	default:
		return "unsure"
	}
}

// Fault is the one error type of rotators and stores. Err must not hold secret bytes.
type Fault struct {
	Class Class
	// Step names what was attempted, verb first in lower case: `apply role "orders_b"`.
	Step string
	// RetryAfter is the least wait before a retry; zero leaves it to the caller.
	RetryAfter time.Duration
	Err        error
}

func (f *Fault) Error() string {
	if f.Err == nil {
		return f.Step + ": " + f.Class.String()
	}
	return f.Step + ": " + f.Err.Error()
}

func (f *Fault) Unwrap() error { return f.Err }

// Faultf makes a Fault whose Err is formatted as by fmt.Errorf.
func Faultf(class Class, step, format string, args ...any) *Fault {
	return &Fault{Class: class, Step: step, Err: fmt.Errorf(format, args...)}
}

// ClassOf is the class of err: that of the outermost *Fault in its chain, otherwise Unsure. A cancelled or expired context
// without a Fault is Unsure too: the change may have been sent. It must not be called with nil.
func ClassOf(err error) Class {
	var f *Fault
	if errors.As(err, &f) {
		return f.Class
	}
	return Unsure
}

// RetryAfterOf is the RetryAfter of the outermost *Fault in err's chain, or 0.
func RetryAfterOf(err error) time.Duration {
	var f *Fault
	if errors.As(err, &f) {
		return f.RetryAfter
	}
	return 0
}

// Interrupted reports whether err comes from a context that was cancelled or ran out.
func Interrupted(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

func appendGeneration(credential string, generation uint64) []byte {
	return strconv.AppendUint([]byte(credential+"\x00"), generation, 10)
}
