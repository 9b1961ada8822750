package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekeyhq/rekey/rotators"
)

// Prove logs in on the primary and every listed replica. Accepted needs all of them, and so does Rejected: a replica that
// lags behind, or that cannot be asked, makes either Unknown.
//
// A login counts only by SCRAM, in which the server shows that it knows the secret too. One that succeeds but does not act
// as the owner, or cannot run the probe, is Unknown with class Refused: a human has to grant something.
func (r *Rotator) Prove(ctx context.Context, op rotators.Op, id rotators.VersionID, m rotators.Material) (rotators.Verdict, error) {
	step := fmt.Sprintf("log in as %q", clip(string(id)))
	role, password := string(m.Reveal(rotators.FieldUsername)), m.Reveal(rotators.FieldPassword)
	if role == "" {
		role = string(id)
	}
	if role != string(id) || len(password) == 0 {
		return rotators.Unknown, rotators.Faultf(rotators.Refused, step, "the secret is that of role %q, or has no password", clip(role))
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	var first rotators.Verdict
	for i, h := range r.hosts {
		r.note(ctx, op, fmt.Sprintf("log in to %s as %s with '[redacted]'", h, ident(role)))
		verdict, err := r.proveOn(ctx, op, h, role, string(password))
		switch {
		case err != nil:
			return rotators.Unknown, rotators.Faultf(loginClass(err), step, "%w", err)
		case i == 0:
			first = verdict
		case verdict != first:
			return rotators.Unknown, rotators.Faultf(rotators.Transient, step, "the primary has %s it, replica %s has %s it", first, h, verdict)
		}
	}
	return first, nil
}

// errPrivilege marks a login that succeeded and then could not do what it must.
var errPrivilege = errors.New("the login works, but not what it is for")

func loginClass(err error) rotators.Class {
	pg := new(pgconn.PgError)
	if errors.Is(err, errPrivilege) || errors.As(err, &pg) && (pg.Code == noPrivilege || pg.Code == noDatabase) {
		return rotators.Refused
	}
	return rotators.Transient
}

func (r *Rotator) proveOn(ctx context.Context, op rotators.Op, h host, role, password string) (rotators.Verdict, error) {
	conn, err := r.dial(ctx, h, role, password, r.database(), scramOnly)
	if err != nil {
		if rejected(err) {
			return rotators.Rejected, nil
		}
		return rotators.Unknown, err
	}
	defer shut(conn)
	var session, current string
	if err := conn.QueryRow(ctx, "SELECT session_user, current_user").Scan(&session, &current); err != nil {
		return rotators.Unknown, err
	}
	want := r.spec.Owner
	if want == "" {
		want = role
	}
	if session != role || current != want {
		return rotators.Unknown, fmt.Errorf("%w: on %s it is %q and acts as %q instead of %q; run: GRANT %[6]s TO %[7]s; ALTER ROLE %[7]s SET ROLE %[6]s",
			errPrivilege, h, session, current, want, pgx.Identifier{want}.Sanitize(), pgx.Identifier{role}.Sanitize())
	}
	if r.spec.Probe == "" {
		return rotators.Accepted, nil
	}
	r.note(ctx, op, r.spec.Probe)
	if err := probe(ctx, conn, r.spec.Probe); err != nil {
		if pg := new(pgconn.PgError); errors.As(err, &pg) && classOfCode(pg.Code) == rotators.Refused {
			err = fmt.Errorf("%w: probe on %s: %w", errPrivilege, h, err)
		}
		return rotators.Unknown, err
	}
	return rotators.Accepted, nil
}

// probe runs one statement in a transaction that is rolled back. The extended protocol refuses several in one.
func probe(ctx context.Context, conn *pgx.Conn, sql string) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL statement_timeout = %d", statementLimit.Milliseconds())); err != nil {
		return err
	}
	return conn.PgConn().ExecParams(ctx, sql, nil, nil, nil, nil).Read().Err // pgx's own Exec would send it as a simple query
}

// rejected reports whether the server refused the login itself. 28000 has two meanings in one code: the role may not log in
// or does not exist, and pg_hba.conf has no line for us, which says nothing of the secret. The error's routine field,
// which is not translated, tells them apart; a server that sends none leaves it Unknown.
func rejected(err error) bool {
	pg := new(pgconn.PgError)
	if !errors.As(err, &pg) {
		return false
	}
	return pg.Code == invalidPassword || pg.Code == invalidAuth && pg.Routine == "InitializeSessionUserId"
}
