package postgres

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// TargetConfig is one PostgreSQL cluster and the engine's admin access to it.
type TargetConfig struct {
	Host     string `json:"host" jsonschema:"required" jsonschema_description:"Name or address of the primary, or the absolute folder of its unix socket. Direct, not through a pooler."`
	Port     int    `json:"port,omitempty" jsonschema:"minimum=1,maximum=65535,default=5432" jsonschema_description:"Port of the primary."`
	Database string `json:"database,omitempty" jsonschema:"default=postgres" jsonschema_description:"Database that the admin connects to. All engines that share a role must name the same one: the lock on a role is kept there."`
	Admin    Admin  `json:"admin" jsonschema:"required" jsonschema_description:"The role that creates and alters the rotated roles."`
	TLS      TLS    `json:"tls,omitzero" jsonschema_description:"How the server is verified."`
	// Replicas are host or host:port; the port defaults to the primary's.
	Replicas []string `json:"replicas,omitempty" jsonschema_description:"Hosts (or host:port) of physical replicas on which a login is also proven and sessions are also ended."`
}

// Admin is a role with CREATEROLE, a member of pg_signal_backend; from PostgreSQL 16 on it also holds ADMIN OPTION on the roles that
// it did not create. It should not be a superuser and must not be one of the rotated roles.
type Admin struct {
	Username string `json:"username" jsonschema:"required" jsonschema_description:"Role with CREATEROLE and membership in pg_signal_backend; not a superuser."`
	Password string `json:"password" jsonschema:"required,format=reference" jsonschema_description:"Reference to its password, such as file:/run/secrets/pg-admin or env:PG_ADMIN."`
}

// The TLS modes, as libpq names them. There is no fallback from one to a weaker one.
const (
	VerifyFull = "verify-full" // the default: the chain and the host's name
	VerifyCA   = "verify-ca"   // the chain only
	Require    = "require"     // encryption without knowing to whom
	Disable    = "disable"     // plaintext: loopback and unix sockets only
)

// TLS says how the server is verified. The zero value is verify-full with the system's certificates.
type TLS struct {
	Mode   string `json:"mode,omitempty" jsonschema:"enum=verify-full,enum=verify-ca,enum=require,enum=disable,default=verify-full" jsonschema_description:"disable is refused unless the host is loopback or a unix socket."`
	CAFile string `json:"ca_file,omitempty" jsonschema:"format=path" jsonschema_description:"PEM file of the authorities to trust instead of the system's."`
	// AllowPlaintext accepts disable on a network. SCRAM still keeps passwords off the wire; everything else is readable.
	AllowPlaintext bool `json:"allow_plaintext,omitempty" jsonschema_description:"Accept mode disable for hosts on a network."`
}

// CredentialConfig is one rotated login: two roles that take turns (the overlap plan), or one (the in-place plan).
type CredentialConfig struct {
	// Owner is a NOLOGIN role that owns the tables. Every session of a rotated role starts as it, so that what one role
	// makes, the other may use. It is created if missing; what it may do is granted by others.
	Owner    string   `json:"owner_role,omitempty" jsonschema_description:"NOLOGIN role that both roles act as and that owns what they create. Required with two roles."`
	Roles    []string `json:"roles" jsonschema:"required,minItems=1,maxItems=2" jsonschema_description:"Two login roles that take turns, or one whose password is replaced in place. Created if missing."`
	Database string   `json:"database,omitempty" jsonschema_description:"Database that consumers use and logins are proven in; the target's if empty."`
	Probe    string   `json:"probe,omitempty" jsonschema_description:"One SQL statement that a new login must be able to run, such as SELECT 1 FROM orders LIMIT 1. It is rolled back."`
}

// roleName is stricter than PostgreSQL, which would accept nearly anything between quotes.
var roleName = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)

// reference is the form of a reference to a secret.
var reference = regexp.MustCompile(`^(file:.+|env:[A-Za-z_][A-Za-z0-9_]*)$`)

// databaseName has no character with a meaning in a connection URL.
var databaseName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$`)

func checkRole(what, name string) error {
	switch {
	case !roleName.MatchString(name):
		return fmt.Errorf("%s %q: want 1 to 63 characters a-z 0-9 _ that do not begin with a digit", what, clip(name))
	case strings.HasPrefix(name, "pg_"):
		return fmt.Errorf("%s %q: names that begin with pg_ are PostgreSQL's own", what, name)
	case slices.Contains([]string{"public", "none", "current_user", "current_role", "session_user"}, name):
		return fmt.Errorf("%s %q: the name has a meaning of its own in SQL", what, name)
	}
	return nil
}

// Validate returns every problem of c, joined. It neither connects nor reads files.
func (c TargetConfig) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	hosts, err := c.hosts()
	if err != nil {
		errs = append(errs, err)
	}
	if c.Port < 0 || c.Port > 65535 {
		bad("port %d: want 1 to 65535", c.Port)
	}
	if c.Database != "" && !databaseName.MatchString(c.Database) {
		bad("database %q: want 1 to 63 characters A-Z a-z 0-9 _ . -", clip(c.Database))
	}
	if c.Admin.Username == "" || len(c.Admin.Username) > 63 || strings.ContainsFunc(c.Admin.Username, control) {
		bad("admin.username %q: want the name of a role", clip(c.Admin.Username))
	}
	switch {
	case c.Admin.Password == "":
		bad("admin.password: missing; want a reference, such as file:/run/secrets/pg-admin")
	case !reference.MatchString(c.Admin.Password): // perhaps the password itself: it must not be shown
		bad("admin.password: want a reference, such as file:/run/secrets/pg-admin or env:PG_ADMIN, never the password itself")
	}
	switch c.TLS.Mode {
	case "", VerifyFull, VerifyCA, Require:
	case Disable:
		for _, h := range hosts {
			if !h.local() && !c.TLS.AllowPlaintext {
				bad("tls.mode disable: %s is on a network; use verify-full, or say allow_plaintext: true", h.name)
			}
		}
	default:
		bad("tls.mode %q: want verify-full, verify-ca, require or disable", clip(c.TLS.Mode))
	}
	return errors.Join(errs...)
}

// Validate returns every problem of c, joined.
func (c CredentialConfig) Validate() error {
	var errs []error
	if len(c.Roles) < 1 || len(c.Roles) > 2 {
		errs = append(errs, fmt.Errorf("roles: want two that take turns, or one that is replaced in place; got %d", len(c.Roles)))
	}
	for i, role := range c.Roles {
		if err := checkRole("role", role); err != nil {
			errs = append(errs, err)
		}
		if slices.Contains(c.Roles[:i], role) {
			errs = append(errs, fmt.Errorf("role %q: named twice", clip(role)))
		}
		if role == c.Owner {
			errs = append(errs, fmt.Errorf("owner_role %q: is one of the roles; it must be a role of its own that nobody logs in as", clip(role)))
		}
	}
	switch {
	case c.Owner != "":
		if err := checkRole("owner_role", c.Owner); err != nil {
			errs = append(errs, err)
		}
	case len(c.Roles) > 1:
		errs = append(errs, errors.New("owner_role: missing; with two roles, what one creates must belong to a third that both act as"))
	}
	if c.Database != "" && !databaseName.MatchString(c.Database) {
		errs = append(errs, fmt.Errorf("database %q: want 1 to 63 characters A-Z a-z 0-9 _ . -", clip(c.Database)))
	}
	if strings.ContainsRune(c.Probe, 0) {
		errs = append(errs, errors.New("probe: holds a zero byte"))
	}
	return errors.Join(errs...)
}

// Claims names what this credential changes at its target, such as role/orders_a. No two credentials of one target may share a
// claim. The owner is not claimed: several credentials may act as it.
func (c CredentialConfig) Claims() []string {
	claims := make([]string, len(c.Roles))
	for i, role := range c.Roles {
		claims[i] = "role/" + role
	}
	return claims
}

// host is one server to connect to.
type host struct {
	name string // or an absolute folder
	port int
}

func (h host) socket() bool { return strings.HasPrefix(h.name, "/") }

// local reports whether what is sent does not leave the machine.
func (h host) local() bool {
	if h.socket() || h.name == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(h.name)
	return err == nil && addr.IsLoopback()
}

func (h host) String() string {
	if h.socket() {
		return path.Join(h.name, ".s.PGSQL."+strconv.Itoa(h.port))
	}
	return net.JoinHostPort(h.name, strconv.Itoa(h.port))
}

// hosts is the primary and then the replicas.
func (c TargetConfig) hosts() ([]host, error) {
	port := c.Port
	if port == 0 {
		port = 5432
	}
	var errs []error
	hosts := []host{{c.Host, port}}
	for _, r := range c.Replicas {
		h := host{r, port}
		if name, p, err := net.SplitHostPort(r); err == nil && !h.socket() {
			n, err := strconv.Atoi(p)
			if err != nil || n < 1 || n > 65535 {
				errs = append(errs, fmt.Errorf("replica %q: the port is not a number from 1 to 65535", clip(r)))
			}
			h = host{name, n}
		}
		if slices.Contains(hosts, h) {
			errs = append(errs, fmt.Errorf("replica %q: named twice", clip(r)))
		}
		hosts = append(hosts, h)
	}
	for _, h := range hosts {
		if h.name == "" || len(h.name) > 253 || strings.ContainsAny(h.name, " ,@?#%\\'\"") || strings.ContainsFunc(h.name, control) || (!h.socket() && strings.Contains(h.name, "/")) {
			errs = append(errs, fmt.Errorf("host %q: want one name or address without a port, or the absolute folder of a unix socket", clip(h.name)))
		}
	}
	return hosts, errors.Join(errs...)
}

func (c TargetConfig) database() string {
	if c.Database == "" {
		return "postgres"
	}
	return c.Database
}

// roots reads CAFile; nil means the system's.
func (c TLS) roots() (*x509.CertPool, error) {
	if c.CAFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("tls.ca_file: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("tls.ca_file %s: holds no PEM certificate", c.CAFile)
	}
	return pool, nil
}

// mode is libpq's sslmode for h. A unix socket carries no TLS.
func (c TLS) mode(h host) string {
	switch {
	case h.socket():
		return Disable
	case c.Mode == "":
		return VerifyFull
	default:
		return c.Mode
	}
}

// client is the TLS configuration for h; nil means plaintext. The CA file is read at each connection, so it may be replaced.
func (c TLS) client(h host) (*tls.Config, error) {
	mode := c.mode(h)
	if mode == Disable {
		return nil, nil
	}
	roots, err := c.roots()
	if err != nil {
		return nil, err
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: h.name}
	if mode == VerifyFull {
		return t, nil
	}
	t.InsecureSkipVerify = true // replaced by the check below, or asked for by mode require
	if mode == VerifyCA {
		t.VerifyConnection = func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the server sent no certificate")
			}
			between := x509.NewCertPool()
			for _, cert := range s.PeerCertificates[1:] {
				between.AddCert(cert)
			}
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between})
			return err
		}
	}
	return t, nil
}

func control(r rune) bool { return r < 0x20 || r == 0x7f }

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
