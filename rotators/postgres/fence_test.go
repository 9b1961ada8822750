package postgres

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

func someOp(epoch, generation uint64) rotators.Op {
	return rotators.Op{ID: rotators.NewOpID(incarnation, "t/c", generation), Credential: "t/c", Epoch: epoch, Generation: generation}
}

func fenced(epoch, generation uint64, s state) *fence {
	op := someOp(epoch, generation)
	return &fence{Schema: 1, Credential: op.Credential, Epoch: epoch, Generation: generation, OpID: op.ID, State: s}
}

// TestDecide goes through every action at epoch 1, generation 5 and every kind of slot.
func TestDecide(t *testing.T) {
	refused, conflict := "refused", "conflict"
	foreign := *fenced(1, 4, applied)
	foreign.Credential = "t/other"
	twin := *fenced(1, 5, applied)
	twin.OpID = uuid.New()
	for _, row := range []struct {
		name                           string
		slot                           slot
		apply, enable, disable, delete string // the state, a class, or "" for nothing to do
	}{
		{"missing", slot{}, "applied", refused, "", ""},
		{"foreign, can log in", slot{exists: true, login: true}, refused, refused, refused, refused},
		{"free, cannot log in", slot{exists: true}, "applied", refused, "deleted", ""},
		{"adopted, can log in", slot{exists: true, login: true, adopted: true}, "applied", "applied", "disabled", "deleted"},
		{"superuser", slot{exists: true, login: true, adopted: true, super: true}, refused, refused, refused, refused},
		{"unreadable fence", slot{exists: true, fenceErr: fmt.Errorf("x")}, refused, refused, refused, refused},
		{"another credential's", slot{exists: true, fence: &foreign}, refused, refused, refused, refused},
		{"adopted, but another's by now", slot{exists: true, adopted: true, fence: &foreign}, refused, refused, refused, refused},

		{"older, applied", slot{exists: true, login: true, fence: fenced(1, 4, applied)}, "applied", "applied", "disabled", "deleted"},
		{"older, disabled", slot{exists: true, fence: fenced(1, 4, disabled)}, "applied", "applied", "disabled", "deleted"},
		{"older, deleted", slot{exists: true, fence: fenced(1, 4, deleted)}, "applied", refused, "deleted", "deleted"},
		{"older epoch, higher generation", slot{exists: true, login: true, fence: fenced(0, 9, applied)}, "applied", "applied", "disabled", "deleted"},

		{"same, applied", slot{exists: true, login: true, fence: fenced(1, 5, applied)}, "applied", "applied", "disabled", "deleted"},
		{"same, disabled", slot{exists: true, fence: fenced(1, 5, disabled)}, conflict, conflict, "disabled", "deleted"},
		{"same, deleted", slot{exists: true, fence: fenced(1, 5, deleted)}, conflict, conflict, "deleted", "deleted"},
		{"same pair, other op", slot{exists: true, fence: &twin}, conflict, conflict, conflict, conflict},

		{"newer, applied", slot{exists: true, login: true, fence: fenced(1, 6, applied)}, conflict, conflict, conflict, conflict},
		{"newer, disabled", slot{exists: true, fence: fenced(1, 6, disabled)}, conflict, conflict, conflict, conflict},
		{"newer, deleted", slot{exists: true, fence: fenced(1, 6, deleted)}, conflict, conflict, conflict, conflict},
		{"newer epoch, lower generation", slot{exists: true, fence: fenced(2, 1, disabled)}, conflict, conflict, conflict, conflict},
	} {
		for a, want := range map[action]string{doApply: row.apply, doEnable: row.enable, doDisable: row.disable, doDelete: row.delete} {
			row.slot.role = "r"
			next, fault := decide(a, someOp(1, 5), row.slot, nil)
			got := string(next)
			if fault != nil {
				got = fault.Class.String()
			}
			if got != want {
				t.Errorf("%s of a slot that is %s: got %q, want %q", a, row.name, got, want)
			}
			// The other slot's fence stops only what brings to life.
			_, stopped := decide(a, someOp(1, 5), row.slot, []slot{{role: "o", exists: true, fence: fenced(2, 1, disabled)}})
			revives := a == doApply || a == doEnable
			if revives && stopped == nil || !revives && (stopped == nil) != (fault == nil) {
				t.Errorf("%s of a slot that is %s, while the other carries a newer op: %v", a, row.name, stopped)
			}
		}
	}
}

func TestCommentKeepsTheUsersText(t *testing.T) {
	for _, text := range []string{"", "orders, nightly", "two\nlines", "ends with newline\n", "rekey is great", "rekey:not last\nline", "quo'te \\ $$ \"x\"", "\n"} {
		f := *fenced(3, 4, disabled)
		f.Credential = "weird'\n\"\\"
		gotText, got, err := splitComment(joinComment(text, f))
		if err != nil || gotText != text || got == nil || *got != f {
			t.Errorf("%q: got %q, %+v, %v", text, gotText, got, err)
		}
	}
	for _, comment := range []string{"rekey:", "rekey:{}", "x\nrekey:{\"v\":2,\"credential\":\"a\",\"state\":\"applied\"}", `rekey:{"v":1,"credential":"a","state":"odd"}`, "rekey: my own words"} {
		if _, f, err := splitComment(comment); err == nil {
			t.Errorf("%q was read as %+v", comment, f)
		}
	}
	if text, f, err := splitComment("just words"); text != "just words" || f != nil || err != nil {
		t.Errorf("got %q, %v, %v", text, f, err)
	}
}

func FuzzSplitComment(f *testing.F) {
	f.Add("text", "t/c", uint64(1))
	f.Add("rekey:{", "a\nb", uint64(0))
	f.Fuzz(func(t *testing.T, text, credential string, generation uint64) {
		_, _, _ = splitComment(text) // must not panic
		in := fence{Schema: 1, Credential: strings.ToValidUTF8(credential, ""), Generation: generation, State: applied}
		if in.Credential == "" {
			return
		}
		gotText, out, err := splitComment(joinComment(text, in))
		if err != nil || gotText != text || *out != in {
			t.Fatalf("got %q %+v %v", gotText, out, err)
		}
	})
}
