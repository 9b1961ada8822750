package postgres

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// state is how far the op of a fence went. Within one op it only rises.
type state string

const (
	applied  state = "applied"
	disabled state = "disabled" // NOLOGIN; the verifier is kept, so that a newer op may enable it
	deleted  state = "deleted"  // NOLOGIN and no verifier: the slot is empty
)

func (s state) rank() int {
	switch s {
	case applied:
		return 1
	case disabled:
		return 2
	case deleted:
		return 3
	}
	return 0
}

// fence is what a role's comment says of the last op that changed the role.
type fence struct {
	Schema     int       `json:"v"`
	Credential string    `json:"credential"`
	Epoch      uint64    `json:"epoch"`
	Generation uint64    `json:"generation"`
	OpID       uuid.UUID `json:"op"`
	State      state     `json:"state"`
}

// fenceMark begins the last line of a role's comment. The lines before it are the user's own.
const fenceMark = "rekey:"

// splitComment separates the user's text from the fence, which is nil where there is none. A line that begins with the mark
// and cannot be read is an error: another build may have written it.
func splitComment(comment string) (text string, f *fence, err error) {
	text, last := "", comment
	if i := strings.LastIndexByte(comment, '\n'); i >= 0 {
		text, last = comment[:i], comment[i+1:]
	}
	data, marked := strings.CutPrefix(last, fenceMark)
	if !marked {
		return comment, nil, nil
	}
	f = new(fence)
	if err := json.Unmarshal([]byte(data), f); err != nil {
		return text, nil, fmt.Errorf("its comment's last line is not a fence that this build can read: %w", err)
	}
	if f.Schema != 1 || f.Credential == "" || f.State.rank() == 0 {
		return text, nil, fmt.Errorf("its comment's last line is a fence of schema %d and state %q, which this build does not know", f.Schema, clip(string(f.State)))
	}
	return text, f, nil
}

// joinComment is the inverse of splitComment.
func joinComment(text string, f fence) string {
	f.Schema = 1
	b, err := json.Marshal(f)
	if err != nil {
		panic("fence cannot be marshalled: " + err.Error()) // plain fields: cannot happen
	}
	if text != "" {
		text += "\n"
	}
	return text + fenceMark + string(b)
}

// slot is one configured role as the server holds it.
type slot struct {
	role     string
	exists   bool
	login    bool
	super    bool
	text     string // the user's own comment
	fence    *fence // nil: never changed by us
	fenceErr error
	adopted  bool
	sessions int
	usable   bool // login, and not expired
}

// action is what an op wants of a slot.
type action int

const (
	doApply action = iota
	doEnable
	doDisable
	doDelete
)

func (a action) String() string {
	return [...]string{"apply", "enable", "disable", "delete"}[a]
}

// decide says which state the op leaves s in. The empty state means that there is nothing to do. An error is a class and
// why; nothing may be changed then. others are the credential's other slots.
//
// Bringing to life is refused if any slot of the credential carries a newer op: then this one was overtaken, even if its
// own slot has never been written. Putting to death asks only the slot itself.
func decide(a action, op rotators.Op, s slot, others []slot) (state, *rotators.Fault) {
	step := fmt.Sprintf("%s role %q", a, s.role)
	if f := foreign(step, op.Credential, s); f != nil {
		return "", f
	}
	if a == doApply || a == doEnable {
		for _, o := range others {
			if o.fence != nil && o.fence.Credential == op.Credential && later(*o.fence, op) {
				return "", conflict(step, op, o)
			}
		}
	}
	if !s.exists {
		switch a {
		case doApply:
			return applied, nil
		case doEnable:
			return "", rotators.Faultf(rotators.Refused, step, "the role does not exist, so there is nothing to enable")
		}
		return "", nil
	}
	if s.fence == nil {
		switch {
		case a == doApply, a == doEnable && s.adopted:
			return applied, nil
		case a == doEnable:
			return "", rotators.Faultf(rotators.Refused, step, "the role was never applied by this credential")
		case s.adopted && a == doDisable:
			return disabled, nil
		case s.adopted:
			return deleted, nil
		case a == doDisable:
			return deleted, nil // empty for us; the fence keeps an overtaken Apply from taking it
		}
		return "", nil // not ours, and nobody can log in as it
	}
	same := s.fence.Epoch == op.Epoch && s.fence.Generation == op.Generation
	if later(*s.fence, op) || same && s.fence.OpID != op.ID {
		return "", conflict(step, op, s)
	}
	switch a {
	case doApply:
		if same && s.fence.State != applied {
			return "", conflict(step, op, s)
		}
		return applied, nil
	case doEnable:
		if same && s.fence.State != applied {
			return "", conflict(step, op, s)
		}
		if s.fence.State == deleted {
			return "", rotators.Faultf(rotators.Refused, step, "the role's password was removed, so there is nothing to enable")
		}
		return applied, nil
	case doDisable:
		if s.fence.State == deleted {
			return deleted, nil
		}
		return disabled, nil
	default:
		return deleted, nil
	}
}

// foreign explains why s may not be touched at all; nil if it may.
func foreign(step, credential string, s slot) *rotators.Fault {
	refuse := func(format string, args ...any) *rotators.Fault {
		return rotators.Faultf(rotators.Refused, step, format, args...)
	}
	switch {
	case !s.exists:
		return nil
	case s.fenceErr != nil:
		return refuse("%w; remove that line with COMMENT ON ROLE if you know that nothing uses it", s.fenceErr)
	case s.fence != nil && s.fence.Credential != credential:
		return refuse("the role belongs to credential %s", clip(s.fence.Credential))
	case s.super:
		return refuse("the role is a superuser; rekey does not rotate one")
	case s.fence == nil && s.login && !s.adopted:
		return refuse("the role exists, can log in and was not made by rekey; adopt it, or run: ALTER ROLE %s NOLOGIN", ident(s.role))
	}
	return nil
}

// later reports whether f is strictly later than op in fence order.
func later(f fence, op rotators.Op) bool {
	return rotators.Op{Epoch: f.Epoch, Generation: f.Generation}.Newer(op.Epoch, op.Generation)
}

func conflict(step string, op rotators.Op, s slot) *rotators.Fault {
	return rotators.Faultf(rotators.Conflict, step, "role %q carries epoch %d generation %d (%s), and this is epoch %d generation %d",
		s.role, s.fence.Epoch, s.fence.Generation, s.fence.State, op.Epoch, op.Generation)
}
