package postgres

import (
	"testing"

	"github.com/rekeyhq/rekey/rotators"
)

// TestTwoRolesTakeTurns is the overlap plan by hand: both work during the overlap, the old one dies with its sessions.
func TestTwoRolesTakeTurns(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	op1, op2, op3 := b.op(0, 1), b.op(0, 2), b.op(0, 3)
	first := b.apply(r, op1)
	b.prove(r, op1, first, rotators.Accepted)
	old := b.open(first)

	second := b.apply(r, op2, b.a)
	b.prove(r, op2, second, rotators.Accepted)
	b.prove(r, op1, first, rotators.Accepted)
	if ended(old) {
		t.Fatal("the overlap ended a session")
	}
	if err := r.Disable(t.Context(), op2, b.a); err != nil {
		t.Fatal(err)
	}
	b.prove(r, op1, first, rotators.Rejected)
	b.prove(r, op2, second, rotators.Accepted)
	if !ended(old) {
		t.Fatal("the old session lives on")
	}
	if err := r.Delete(t.Context(), op2, b.a); err != nil {
		t.Fatal(err)
	}
	third := b.apply(r, op3, b.b)
	b.prove(r, op3, third, rotators.Accepted)
	b.prove(r, op1, first, rotators.Rejected)
	if got := string(third.Reveal(rotators.FieldUsername)); got != string(b.a) {
		t.Fatalf("the third generation is role %s", got)
	}
}
