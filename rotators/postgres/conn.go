package postgres

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekeyhq/rekey/rotators"
)

// The SQLSTATEs that we tell apart (PostgreSQL manual, appendix A).
const (
	invalidPassword   = "28P01"
	invalidAuth       = "28000" // both "not permitted to log in" and "no pg_hba.conf entry"
	noPrivilege       = "42501"
	readOnly          = "25006"
	idleInTransaction = "25P03"
	duplicateRole     = "42710"
	uniqueViolation   = "23505"
	lockNotAvailable  = "55P03"
	queryCanceled     = "57014"
	noDatabase        = "3D000"
	undefinedObject   = "42704"
)

// scramOnly makes a login count only if the server has shown in a SCRAM exchange that it knows our secret. A server that
// trusts everybody, or that asks for the plaintext, is refused by the client.
const scramOnly = "scram-sha-256"

// dial opens one connection. The driver's own sources of configuration (PG* variables, ~/.pgpass, service files) are not used.
func (r *Rotator) dial(ctx context.Context, h host, user, password, database, auth string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig("host=localhost port=5432 user=x password=x dbname=x sslmode=disable passfile='' sslrootcert='' sslcert='' sslkey='' connect_timeout=0 require_auth='' channel_binding=prefer")
	if err != nil { // a PG* variable that cannot be parsed
		return nil, fmt.Errorf("prepare a connection: %w", err)
	}
	tlsConfig, err := r.target.TLS.client(h)
	if err != nil {
		return nil, err
	}
	cfg.Host, cfg.Port, cfg.User, cfg.Password, cfg.Database = h.name, uint16(h.port), user, password, database
	cfg.TLSConfig, cfg.Fallbacks, cfg.RequireAuth, cfg.SSLNegotiation, cfg.SSLCertMode = tlsConfig, nil, auth, "postgres", "disable"
	cfg.ValidateConnect, cfg.AfterConnect, cfg.ConnectTimeout = nil, nil, 0
	cfg.RuntimeParams = map[string]string{"client_encoding": "UTF8", "application_name": "rekey"}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	if r.dialFunc != nil {
		cfg.DialFunc = r.dialFunc
		cfg.LookupFunc = func(_ context.Context, name string) ([]string, error) { return []string{name}, nil }
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	var ce *pgconn.ConnectError
	if errors.As(err, &ce) { // it holds the password in a field
		err = fmt.Errorf("connect to %s as %q: %w", h, user, ce.Unwrap())
	}
	return conn, err
}

// admin connects to h as the admin.
func (r *Rotator) admin(ctx context.Context, step string, h host) (*pgx.Conn, error) {
	secret, err := r.resolve(ctx, r.target.Admin.Password)
	if err != nil {
		class := rotators.Refused
		if f := new(rotators.Fault); errors.As(err, &f) {
			class = f.Class
		} else if rotators.Interrupted(err) {
			class = rotators.Transient
		}
		return nil, rotators.Faultf(class, step, "read the admin password at %s: %w", r.target.Admin.Password, err)
	}
	conn, err := r.dial(ctx, h, r.target.Admin.Username, string(secret), r.target.database(), r.adminAuth(h))
	if err == nil {
		return conn, nil
	}
	class := rotators.Transient // nothing has been asked for yet
	if pg := new(pgconn.PgError); errors.As(err, &pg) {
		switch pg.Code {
		case invalidPassword, invalidAuth:
			return nil, rotators.Faultf(rotators.Refused, step, "%w; is the password at %s that of admin role %q, and does pg_hba.conf let it in?",
				err, r.target.Admin.Password, r.target.Admin.Username)
		case noDatabase, noPrivilege:
			class = rotators.Refused
		}
	}
	return nil, rotators.Faultf(class, step, "%w", err)
}

// adminAuth keeps the admin's password off the wire where the server is not verified.
func (r *Rotator) adminAuth(h host) string {
	switch r.target.TLS.mode(h) {
	case VerifyFull, VerifyCA:
		return ""
	}
	return "!password"
}

func shut(conn *pgx.Conn) {
	if conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// classify turns an error of a statement into a Fault. mayHaveCommitted says that the statement held the COMMIT and that sending
// it has begun. The driver's SafeToRetry is not asked: it is true of a connection that was lost while waiting for the
// reply (pgx 5.12).
func classify(step string, err error, mayHaveCommitted bool) *rotators.Fault {
	class := rotators.Transient
	pg := new(pgconn.PgError)
	switch {
	case !errors.As(err, &pg):
		if mayHaveCommitted {
			class = rotators.Unsure
		}
	case pg.Code == idleInTransaction: // the server had rolled back before it read what we sent
	case fatal(pg):
		if mayHaveCommitted { // ended by an administrator or a crash, perhaps after the commit was durable
			class = rotators.Unsure
		}
	default: // the server answered with an error, so the transaction is rolled back
		class = classOfCode(pg.Code)
	}
	return rotators.Faultf(class, step, "%w", err)
}

func fatal(pg *pgconn.PgError) bool {
	severity := pg.SeverityUnlocalized
	if severity == "" {
		severity = pg.Severity
	}
	return severity == "FATAL" || severity == "PANIC"
}

func classOfCode(code string) rotators.Class {
	switch code {
	case lockNotAvailable, queryCanceled, duplicateRole, uniqueViolation, readOnly:
		return rotators.Transient
	}
	if len(code) == 5 {
		switch code[:2] {
		case "08", "40", "53", "57", "58", "XX": // connection, rollback, resources, intervention, system, internal
			return rotators.Transient
		}
	}
	return rotators.Refused
}

// statement is SQL and what may be shown of it.
type statement struct{ sql, shown string }

func plain(format string, args ...any) statement {
	s := fmt.Sprintf(format, args...)
	return statement{s, s}
}

// ident quotes an identifier.
func ident(name string) string { return pgx.Identifier{name}.Sanitize() }

// literal quotes a string for standard_conforming_strings = on, which every transaction of ours sets. PostgreSQL cannot hold a zero
// byte, so there is none to keep.
func literal(s string) string {
	return "'" + strings.ReplaceAll(strings.ReplaceAll(s, "\x00", ""), "'", "''") + "'"
}

// iterations is PostgreSQL's own default; the passwords that we make have 240 bits.
const iterations = 4096

// verifier is what PostgreSQL stores of a password (RFC 5803 form; "SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>"). The
// plaintext then never reaches the server or its log. The password must be printable ASCII, which SASLprep leaves as it is.
func verifier(password []byte, random io.Reader) (string, error) {
	salt := make([]byte, 16)
	if _, err := io.ReadFull(random, salt); err != nil {
		return "", fmt.Errorf("draw a salt: %w", err)
	}
	salted, err := pbkdf2.Key(sha256.New, string(password), salt, iterations, sha256.Size)
	if err != nil {
		return "", err
	}
	sign := func(text string) []byte {
		mac := hmac.New(sha256.New, salted)
		mac.Write([]byte(text))
		return mac.Sum(nil)
	}
	stored := sha256.Sum256(sign("Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, b64(salt), b64(stored[:]), b64(sign("Server Key"))), nil
}

func printableASCII(b []byte) bool {
	for _, c := range b {
		if c < 0x20 || c > 0x7e {
			return false
		}
	}
	return len(b) > 0
}
