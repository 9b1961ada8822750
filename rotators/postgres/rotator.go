// Package postgres rotates login roles of PostgreSQL 13 and later.
//
// Two roles take turns below one NOLOGIN owner role (the overlap plan), or one role's password is replaced (the in-place
// plan). The fence is the last line of each role's comment. All changes of one call are one transaction.
package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekeyhq/rekey/rotators"
)

// The limits that the server itself keeps for our transactions, so that a worker frozen inside one neither holds a role's lock for
// longer nor changes anything later than its deadline plus idleLimit.
const (
	lockLimit      = 5 * time.Second
	statementLimit = 10 * time.Second
	idleLimit      = 5 * time.Second
)

// DefaultTimeout bounds a call whose context has no earlier deadline.
const DefaultTimeout = 30 * time.Second

// Config is what New needs.
type Config struct {
	Target     TargetConfig
	Credential CredentialConfig
	// ID is the credential's, as in Op.Credential.
	ID string
	// Adopted is a role that another made and the credential took over: it may be changed although it carries no fence.
	Adopted rotators.VersionID
	// Resolve reads the secret behind a reference of the configuration. It is asked at every connection.
	Resolve func(ctx context.Context, ref string) ([]byte, error)
	// Record receives every statement, redacted, before it is sent; nil records nothing.
	Record rotators.Recorder
	// Random is for salts; crypto/rand if nil.
	Random io.Reader
	// Timeout bounds one call; DefaultTimeout if zero.
	Timeout time.Duration
}

// Rotator rotates one credential. It implements rotators.Rotator, Composer and Checker and holds no connection between calls.
type Rotator struct {
	target   TargetConfig
	spec     CredentialConfig
	hosts    []host
	id       string
	adopted  rotators.VersionID
	resolve  func(context.Context, string) ([]byte, error)
	record   rotators.Recorder
	random   io.Reader
	timeout  time.Duration
	idle     time.Duration        // idleLimit, less in tests
	dialFunc pgconn.DialFunc      // nil: the driver's
	scanned  func(attempt int)    // tests: after each scan for sessions
	before   func(stmt statement) // tests: before a change is sent
}

var (
	_ rotators.Rotator  = (*Rotator)(nil)
	_ rotators.Composer = (*Rotator)(nil)
	_ rotators.Checker  = (*Rotator)(nil)
)

// New validates c and connects to nothing.
func New(c Config) (*Rotator, error) {
	errs := []error{c.Target.Validate(), c.Credential.Validate()}
	if c.ID == "" {
		errs = append(errs, errors.New("postgres: Config.ID is missing"))
	}
	if c.Resolve == nil {
		errs = append(errs, errors.New("postgres: Config.Resolve is missing"))
	}
	if slices.Contains(c.Credential.Roles, c.Target.Admin.Username) || c.Target.Admin.Username != "" && c.Target.Admin.Username == c.Credential.Owner {
		errs = append(errs, fmt.Errorf("role %q: is the target's admin, and the engine must not take its own access away", c.Target.Admin.Username))
	}
	if c.Adopted != "" && !slices.Contains(c.Credential.Roles, string(c.Adopted)) {
		errs = append(errs, fmt.Errorf("adopted role %q: is not one of the credential's roles", clip(string(c.Adopted))))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	hosts, err := c.Target.hosts()
	if err != nil {
		return nil, err
	}
	r := &Rotator{
		target: c.Target, spec: c.Credential, hosts: hosts, id: c.ID, adopted: c.Adopted,
		resolve: c.Resolve, record: c.Record, random: c.Random, timeout: c.Timeout, idle: idleLimit,
	}
	r.spec.Roles = slices.Clone(r.spec.Roles)
	if r.random == nil {
		r.random = rand.Reader
	}
	if r.timeout == 0 {
		r.timeout = DefaultTimeout
	}
	return r, nil
}

// Traits are those of the configured number of roles.
func (r *Rotator) Traits() rotators.Traits { return r.spec.Traits() }

// Traits are known without connecting.
func (c CredentialConfig) Traits() rotators.Traits {
	return rotators.Traits{MaxLive: max(1, len(c.Roles)), Countable: true, Kills: true}
}

// Close does nothing: there is no connection between calls.
func (r *Rotator) Close() error { return nil }

// alphabet has 64 letters, so that six bits of a byte choose one without bias. None needs quoting in a URL, a shell or SQL.
const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"

const passwordLength = 40

// Compose names the first role that is not in use; a single role is named always. The fields are username, password, host,
// port, database and dsn, a connection URL.
func (r *Rotator) Compose(op rotators.Op, inUse []rotators.VersionID, random io.Reader) (rotators.VersionID, rotators.Material, error) {
	step := "compose for " + strconv.Quote(op.Credential)
	role := ""
	for _, candidate := range r.spec.Roles {
		if len(r.spec.Roles) == 1 || !slices.Contains(inUse, rotators.VersionID(candidate)) {
			role = candidate
			break
		}
	}
	if role == "" {
		return "", rotators.Material{}, rotators.Faultf(rotators.Refused, step, "every configured role is in use: %v", inUse)
	}
	password := make([]byte, passwordLength)
	if _, err := io.ReadFull(random, password); err != nil {
		return "", rotators.Material{}, rotators.Faultf(rotators.Transient, step, "draw a password: %w", err)
	}
	for i, b := range password {
		password[i] = alphabet[b&63]
	}
	return rotators.VersionID(role), r.material(role, string(password)), nil
}

func (r *Rotator) material(role, password string) rotators.Material {
	h := r.hosts[0]
	dsn := url.URL{Scheme: "postgres", User: url.UserPassword(role, password), Host: h.String(), Path: "/" + r.database()}
	query := url.Values{"sslmode": {r.target.TLS.mode(h)}}
	if h.socket() {
		dsn.Host = ""
		query.Set("host", h.name)
		query.Set("port", strconv.Itoa(h.port))
	}
	dsn.RawQuery = query.Encode()
	return rotators.Text(map[string]string{
		rotators.FieldUsername: role, rotators.FieldPassword: password, rotators.FieldDSN: dsn.String(),
		"host": h.name, "port": strconv.Itoa(h.port), "database": r.database(),
	})
}

func (r *Rotator) database() string {
	if r.spec.Database != "" {
		return r.spec.Database
	}
	return r.target.database()
}

// Apply lets the role that m names log in with m's password, creates it and its owner if they are missing, and ends the
// sessions that it had: they were opened with another secret. Until Apply returns nil, some of those may still be there.
func (r *Rotator) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	role, password := string(m.Reveal(rotators.FieldUsername)), m.Reveal(rotators.FieldPassword)
	if !printableASCII(password) {
		return rotators.Version{}, rotators.Faultf(rotators.Refused, "apply role "+strconv.Quote(role), "the password is empty or holds other characters than printable ASCII")
	}
	secret, err := verifier(password, r.random)
	if err != nil {
		return rotators.Version{}, rotators.Faultf(rotators.Transient, "apply role "+strconv.Quote(role), "%w", err)
	}
	return rotators.Version{ID: rotators.VersionID(role)}, r.change(ctx, doApply, op, role, secret)
}

// Disable commits NOLOGIN and then ends the role's sessions, on the primary and every listed replica, until two consecutive
// scans find none. The verifier is kept, so that Enable can undo it. An error after the commit is Unsure; the
// role then refuses logins, and a repeat goes on with its sessions.
func (r *Rotator) Disable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return r.change(ctx, doDisable, op, string(id), "")
}

// Enable commits LOGIN for a role whose verifier is still there: one that was disabled, not deleted.
func (r *Rotator) Enable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return r.change(ctx, doEnable, op, string(id), "")
}

// Delete empties the slot: NOLOGIN PASSWORD NULL, sessions ended. The role stays, with its memberships and the fence.
func (r *Rotator) Delete(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return r.change(ctx, doDelete, op, string(id), "")
}

// change performs one action in one transaction of three round trips: lock, read, write with COMMIT. It ends sessions after that.
//
// The lock is an advisory one per configured role, held to the end of the transaction, in the target's database. A worker
// that is frozen while it holds it loses it, and its transaction, after idleLimit; one that is frozen before it finds a
// newer fence when it wakes.
func (r *Rotator) change(ctx context.Context, a action, op rotators.Op, role, secret string) error {
	step := fmt.Sprintf("%s role %q", a, clip(role))
	if op.Credential != r.id {
		return rotators.Faultf(rotators.Refused, step, "the op is of credential %q, and this is %q", clip(op.Credential), r.id)
	}
	if !slices.Contains(r.spec.Roles, role) {
		return rotators.Faultf(rotators.Refused, step, "the role is not one of %v", r.spec.Roles)
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	conn, err := r.admin(ctx, step, r.hosts[0])
	if err != nil {
		return err
	}
	defer shut(conn)

	if err := r.exec(ctx, conn, op, r.begin()...); err != nil {
		return classify(step, err, false)
	}
	slots, owner, err := r.read(ctx, conn, op)
	if err != nil {
		return classify(step, err, false)
	}
	i := slices.Index(r.spec.Roles, role)
	target, others := slots[i], slices.Delete(slices.Clone(slots), i, i+1)
	next, fault := decide(a, op, target, others)
	if fault == nil && a == doApply {
		fault = owner.refuse(step)
	}
	if fault != nil {
		return fault
	}
	if next == "" {
		return nil
	}
	stmts := r.write(a, op, target, owner, next, secret, conn)
	if err := over(ctx); err != nil {
		return rotators.Faultf(rotators.Transient, step, "%w", err)
	}
	if err := r.exec(ctx, conn, op, append(stmts, plain("COMMIT"))...); err != nil {
		fault := classify(step, err, true)
		if pg := new(pgconn.PgError); errors.As(err, &pg) && pg.Code == noPrivilege {
			fault.Err = fmt.Errorf("%w; %s", err, r.remedy(ctx, conn))
		}
		return fault
	}
	if a == doEnable || a == doApply && !target.exists {
		return nil
	}
	return r.endSessions(ctx, step, op, conn, role, a != doApply)
}

// over is ctx.Err, and does not wait for a timer: a process that was frozen past its deadline wakes before its timers do.
func over(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// begin opens the transaction and takes the locks, in one order for every caller. What the server then does is bounded by the
// server.
func (r *Rotator) begin() []statement {
	ms := func(d time.Duration) int64 { return d.Milliseconds() }
	stmts := []statement{
		plain("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"),
		plain("SET LOCAL idle_in_transaction_session_timeout = %d", ms(r.idle)),
		plain("SET LOCAL lock_timeout = %d", ms(lockLimit)),
		plain("SET LOCAL statement_timeout = %d", ms(statementLimit)),
		plain("SET LOCAL standard_conforming_strings = on"),
		// A commit that a power cut undoes would bring a killed login back.
		plain("SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"),
	}
	for _, role := range slices.Sorted(slices.Values(r.spec.Roles)) {
		stmts = append(stmts, plain("SELECT pg_advisory_xact_lock(%d)", lockKey(role)))
	}
	return stmts
}

func lockKey(role string) int64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte("rekey role " + role))
	return int64(h.Sum64())
}

// exec records and sends statements as one simple query.
func (r *Rotator) exec(ctx context.Context, conn *pgx.Conn, op rotators.Op, stmts ...statement) error {
	sql, shown := make([]string, len(stmts)), make([]string, len(stmts))
	for i, s := range stmts {
		sql[i], shown[i] = s.sql, s.shown
	}
	all := statement{strings.Join(sql, "; "), strings.Join(shown, "; ")}
	r.note(ctx, op, all.shown)
	if r.before != nil {
		r.before(all)
	}
	_, err := conn.PgConn().Exec(ctx, all.sql).ReadAll()
	return err
}

func (r *Rotator) note(ctx context.Context, op rotators.Op, shown string) {
	if r.record != nil {
		r.record(ctx, op, shown)
	}
}

// read returns the configured roles in order, and the owner.
func (r *Rotator) read(ctx context.Context, conn *pgx.Conn, op rotators.Op) ([]slot, slot, error) {
	const query = `SELECT r.rolname, r.rolcanlogin, r.rolsuper, coalesce(shobj_description(r.oid, 'pg_authid'), ''),
	coalesce(r.rolvaliduntil > now(), true),
	(SELECT count(*) FROM pg_stat_activity a WHERE a.usesysid = r.oid AND a.pid <> pg_backend_pid())
FROM pg_roles r WHERE r.rolname = ANY ($1)`
	r.note(ctx, op, query)
	slots := make([]slot, len(r.spec.Roles))
	for i, role := range r.spec.Roles {
		slots[i] = slot{role: role, adopted: role == string(r.adopted)}
	}
	owner := slot{role: r.spec.Owner}
	rows, err := conn.Query(ctx, query, append(slices.Clone(r.spec.Roles), r.spec.Owner))
	if err != nil {
		return nil, owner, err
	}
	defer rows.Close()
	for rows.Next() {
		var s slot
		var comment string
		if err := rows.Scan(&s.role, &s.login, &s.super, &comment, &s.usable, &s.sessions); err != nil {
			return nil, owner, err
		}
		s.exists, s.adopted, s.usable = true, s.role == string(r.adopted), s.usable && s.login
		s.text, s.fence, s.fenceErr = splitComment(comment)
		if i := slices.Index(r.spec.Roles, s.role); i >= 0 {
			slots[i] = s
		} else {
			owner = s
		}
	}
	return slots, owner, rows.Err()
}

// refuse explains why no role may act as this owner; nil if it may.
func (s slot) refuse(step string) *rotators.Fault {
	switch {
	case s.exists && s.super:
		return rotators.Faultf(rotators.Refused, step, "owner %q is a superuser", s.role)
	case s.exists && s.login:
		return rotators.Faultf(rotators.Refused, step, "owner %q can log in; run: ALTER ROLE %s NOLOGIN", s.role, ident(s.role))
	}
	return nil
}

// write is what turns the slot into next, fence included.
func (r *Rotator) write(a action, op rotators.Op, s, owner slot, next state, secret string, conn *pgx.Conn) []statement {
	role := ident(s.role)
	var stmts []statement
	switch {
	case a == doApply:
		if owner.role != "" && !owner.exists {
			stmts = append(stmts, plain("CREATE ROLE %s NOLOGIN", ident(owner.role)))
		}
		verb := "ALTER"
		if !s.exists {
			verb = "CREATE"
		}
		format := verb + " ROLE " + role + " LOGIN INHERIT PASSWORD %s VALID UNTIL 'infinity'"
		stmts = append(stmts, statement{fmt.Sprintf(format, literal(secret)), fmt.Sprintf(format, "'[redacted]'")})
		if owner.role != "" {
			grant := plain("GRANT %s TO %s", ident(owner.role), role)
			if version(conn) >= 16 { // before, a member inherits by its own attribute and may always SET ROLE
				grant = plain("%s WITH INHERIT TRUE, SET TRUE", grant.sql)
			}
			stmts = append(stmts, grant, plain("ALTER ROLE %s SET ROLE %s", role, ident(owner.role)))
		}
	case a == doEnable:
		stmts = append(stmts, plain("ALTER ROLE %s LOGIN", role))
	case s.fence == nil && !s.adopted: // not ours: only the fence
	case a == doDelete:
		stmts = append(stmts, plain("ALTER ROLE %s NOLOGIN PASSWORD NULL", role))
	default:
		stmts = append(stmts, plain("ALTER ROLE %s NOLOGIN", role))
	}
	comment := joinComment(s.text, fence{Credential: op.Credential, Epoch: op.Epoch, Generation: op.Generation, OpID: op.ID, State: next})
	return append(stmts, plain("COMMENT ON ROLE %s IS %s", role, literal(comment)))
}

// version is the server's major version; 0 if it does not say.
func version(conn *pgx.Conn) int {
	digits := conn.PgConn().ParameterStatus("server_version")
	if i := strings.IndexFunc(digits, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = digits[:i]
	}
	n, _ := strconv.Atoi(digits)
	return n
}
