package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekeyhq/rekey/rotators"
)

// Inspect lists the configured roles that exist. Sessions are those on the primary.
func (r *Rotator) Inspect(ctx context.Context) ([]rotators.VersionInfo, error) {
	const step = "inspect roles"
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	conn, err := r.admin(ctx, step, r.hosts[0])
	if err != nil {
		return nil, err
	}
	defer shut(conn)
	slots, _, err := r.read(ctx, conn, rotators.Op{Credential: r.id})
	if err != nil {
		return nil, classify(step, err, false)
	}
	infos := []rotators.VersionInfo{}
	for _, s := range slots {
		if !s.exists {
			continue
		}
		info := rotators.VersionInfo{ID: rotators.VersionID(s.role), Enabled: s.usable, Sessions: s.sessions}
		if s.fence != nil && s.fence.Credential == r.id {
			info.Ours, info.Generation, info.Epoch, info.OpID = true, s.fence.Generation, s.fence.Epoch, s.fence.OpID
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// Check looks at the admin's privileges, at the roles, and at whether a wrong password is refused. It changes nothing. An error
// means that it could not look; what an operator has to mend, a refused admin login included, is a finding.
func (r *Rotator) Check(ctx context.Context) ([]rotators.Finding, error) {
	const step = "check target"
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	op := rotators.Op{Credential: r.id}
	conn, err := r.admin(ctx, step, r.hosts[0])
	if err != nil {
		if rotators.ClassOf(err) == rotators.Refused {
			return []rotators.Finding{{Message: err.Error(), Fatal: true}}, nil
		}
		return nil, err
	}
	defer shut(conn)
	slots, owner, err := r.read(ctx, conn, op)
	if err != nil {
		return nil, classify(step, err, false)
	}
	var found []rotators.Finding
	if f := owner.refuse(step); f != nil {
		found = append(found, rotators.Finding{Message: f.Error(), Fatal: true})
	}
	for _, s := range slots {
		if f := foreign(step, r.id, s); f != nil {
			found = append(found, rotators.Finding{Message: fmt.Sprintf("role %q: %v", s.role, f.Err), Fatal: true})
		}
	}
	missing, err := r.privileges(ctx, conn, slots, owner)
	if err != nil {
		return nil, classify(step, err, false)
	}
	others, err := r.surroundings(ctx, conn)
	if err != nil {
		return nil, classify(step, err, false)
	}
	found = slices.Concat(found, missing, others)
	for _, h := range r.hosts {
		f, err := r.refusesStrangers(ctx, h)
		if err != nil {
			return nil, rotators.Faultf(rotators.Transient, step, "%w", err)
		}
		found = append(found, f...)
	}
	return found, nil
}

// privileges finds what the admin lacks. Up to PostgreSQL 15 CREATEROLE alone reaches every role but superusers; from 16 on it
// reaches those that the admin made itself or holds with ADMIN OPTION.
func (r *Rotator) privileges(ctx context.Context, conn *pgx.Conn, slots []slot, owner slot) ([]rotators.Finding, error) {
	var super, createRole, signals bool
	if err := r.ask(ctx, conn, `SELECT rolsuper, rolcreaterole, pg_has_role(oid, 'pg_signal_backend', 'USAGE')
FROM pg_roles WHERE rolname = current_user`).Scan(&super, &createRole, &signals); err != nil {
		return nil, err
	}
	admin := ident(r.target.Admin.Username)
	if super {
		return []rotators.Finding{{
			Message: fmt.Sprintf("admin role %s is a superuser, which is more than rotating needs", admin),
			Remedy:  "use a role made by: CREATE ROLE … LOGIN CREATEROLE IN ROLE pg_signal_backend",
		}}, nil
	}
	var found []rotators.Finding
	lacks := func(what, remedy string) {
		found = append(found, rotators.Finding{Message: fmt.Sprintf("admin role %s %s", admin, what), Remedy: remedy, Fatal: true})
	}
	if !createRole {
		lacks("may not create or alter roles", "run as a superuser: ALTER ROLE "+admin+" CREATEROLE")
	}
	if !signals {
		lacks("may not end sessions", "run as a superuser: GRANT pg_signal_backend TO "+admin)
	}
	for _, s := range append(slices.Clone(slots), owner) {
		if version(conn) < 16 || !s.exists {
			continue
		}
		var reaches bool
		if err := r.ask(ctx, conn, "SELECT pg_has_role(current_user, $1::name, 'MEMBER WITH ADMIN OPTION')", s.role).Scan(&reaches); err != nil {
			return nil, err
		}
		if !reaches {
			lacks(fmt.Sprintf("may not alter or grant role %q", s.role), fmt.Sprintf("run as a superuser: GRANT %s TO %s WITH ADMIN OPTION", ident(s.role), admin))
		}
	}
	return found, nil
}

// ask records and sends a query of one row.
func (r *Rotator) ask(ctx context.Context, conn *pgx.Conn, sql string, args ...any) pgx.Row {
	r.note(ctx, rotators.Op{Credential: r.id}, sql)
	return conn.QueryRow(ctx, sql, args...)
}

// remedy is what to run after a change was refused for lack of a privilege.
func (r *Rotator) remedy(ctx context.Context, conn *pgx.Conn) string {
	const unknown = "the admin lacks a privilege on one of the roles"
	if _, err := conn.Exec(ctx, "ROLLBACK"); err != nil {
		return unknown
	}
	slots, owner, err := r.read(ctx, conn, rotators.Op{Credential: r.id})
	if err != nil {
		return unknown
	}
	found, err := r.privileges(ctx, conn, slots, owner)
	if err != nil || len(found) == 0 {
		return unknown
	}
	remedies := make([]string, len(found))
	for i, f := range found {
		remedies[i] = f.Remedy
	}
	if owner.role != "" && !owner.exists {
		remedies = append(remedies, "or make the owner yourself: CREATE ROLE "+ident(owner.role)+" NOLOGIN")
	}
	return strings.Join(remedies, "; ")
}

// surroundings finds what is not about privileges: the database, TLS, and objects that one role owns alone.
func (r *Rotator) surroundings(ctx context.Context, conn *pgx.Conn) ([]rotators.Finding, error) {
	var found []rotators.Finding
	var exists bool
	if err := r.ask(ctx, conn, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", r.database()).Scan(&exists); err != nil {
		return nil, err
	}
	if !exists {
		found = append(found, rotators.Finding{Message: fmt.Sprintf("database %q does not exist", r.database()), Fatal: true})
	}
	for _, h := range r.hosts {
		if mode := r.target.TLS.mode(h); !h.local() && (mode == Require || mode == Disable) {
			found = append(found, rotators.Finding{
				Message: fmt.Sprintf("with tls.mode %s nobody checks that %s is who it claims to be", mode, h),
				Remedy:  "use verify-full, with ca_file if the certificate is not publicly trusted",
			})
		}
	}
	if r.spec.Owner == "" {
		return found, nil
	}
	const owned = `SELECT r.rolname, count(*) FROM pg_shdepend d JOIN pg_roles r ON r.oid = d.refobjid
WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype = 'o' AND r.rolname = ANY ($1) GROUP BY 1 ORDER BY 1`
	r.note(ctx, rotators.Op{Credential: r.id}, owned)
	rows, err := conn.Query(ctx, owned, r.spec.Roles)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var role string
		var n int
		if err := rows.Scan(&role, &n); err != nil {
			return nil, err
		}
		found = append(found, rotators.Finding{
			Message: fmt.Sprintf("role %q itself owns %d objects, which the other role may not be able to use", role, n),
			Remedy:  fmt.Sprintf("run in each database: REASSIGN OWNED BY %s TO %s", ident(role), ident(r.spec.Owner)),
		})
	}
	return found, rows.Err()
}

// refusesStrangers logs in to h as each role with a random password, which must be refused as a wrong password by SCRAM. The
// server answers so for a role that does not exist, too.
func (r *Rotator) refusesStrangers(ctx context.Context, h host) ([]rotators.Finding, error) {
	var found []rotators.Finding
	for _, role := range r.spec.Roles {
		r.note(ctx, rotators.Op{Credential: r.id}, fmt.Sprintf("log in to %s as %s with a random password", h, ident(role)))
		conn, err := r.dial(ctx, h, role, rand.Text(), r.database(), scramOnly)
		shut(conn)
		pg := new(pgconn.PgError)
		answered := errors.As(err, &pg)
		switch {
		case answered && pg.Code == invalidPassword:
			continue
		case answered && (pg.Code == invalidAuth || pg.Code == noDatabase):
			found = append(found, rotators.Finding{
				Message: fmt.Sprintf("a login on %s as %q cannot be tried from here: %v", h, role, err), Fatal: true,
				Remedy: "let the workers in with a scram-sha-256 line in pg_hba.conf",
			})
			continue
		case answered || err != nil && (rotators.Interrupted(err) || !r.reachable(ctx, h)):
			return nil, err
		}
		// SCRAM did not take place. Whether it trusts us or wants another method shows when we accept to be trusted.
		trusting, err := r.dial(ctx, h, role, rand.Text(), r.database(), "none")
		shut(trusting)
		if err == nil || errors.As(err, &pg) {
			found = append(found, rotators.Finding{
				Message: fmt.Sprintf("%s lets %q in without asking for a password (trust, peer or cert in pg_hba.conf), so no login there proves anything", h, role),
				Remedy:  "use scram-sha-256 for these roles in pg_hba.conf and run: SELECT pg_reload_conf()", Fatal: true,
			})
			continue
		}
		found = append(found, rotators.Finding{
			Message: fmt.Sprintf("%s does not authenticate %q by SCRAM: %v", h, role, err),
			Remedy:  "use scram-sha-256 for these roles in pg_hba.conf and run: SELECT pg_reload_conf()", Fatal: true,
		})
	}
	return found, nil
}

// reachable tells a network failure from a login that we refused to go on with.
func (r *Rotator) reachable(ctx context.Context, h host) bool {
	conn, err := r.admin(ctx, "reach "+h.String(), h)
	shut(conn)
	return err == nil
}
