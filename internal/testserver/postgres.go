//go:build unix

package testserver

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// PostgresConfig says how a server is started. The zero value is a SCRAM-only server without TLS.
type PostgresConfig struct {
	// Trust lets everybody in without a password, to test that this is noticed.
	Trust bool
	// TLS turns on TLS with a certificate for 127.0.0.1 and localhost, signed by the CA in CAFile.
	TLS bool
	// HBA lines come before the usual ones of pg_hba.conf.
	HBA []string
	// Settings are added to postgresql.conf. Later ones win over ours: log_statement=all, fsync=off.
	Settings map[string]string
	// Timeout bounds a start or a stop; 60 s if zero.
	Timeout time.Duration
}

// Postgres is a running server with its data in a temporary folder. It listens on one private loopback port and one
// socket folder. Its methods are not for concurrent use.
type Postgres struct {
	Host      string // 127.0.0.1
	Port      int
	SocketDir string // a host for clients that want the unix socket
	User      string // the superuser
	Password  string // its password
	Database  string // an empty database: postgres
	LogFile   string // with every statement
	CAFile    string // PEM; empty without TLS

	cfg      PostgresConfig
	bin      string // folder of the programs
	dir      string // everything of ours
	uid, gid int    // -1: ours
	cmd      *exec.Cmd
	exited   chan struct{}
}

// StartPostgres makes a cluster and starts it. PostgreSQL refuses to run as root, so as root it runs as the user postgres or
// nobody. The caller must Stop it. On Linux it also ends with the process that started it, however that ends.
func StartPostgres(cfg PostgresConfig) (*Postgres, error) {
	bin, err := findPostgres()
	if err != nil {
		return nil, err
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Minute
	}
	p := &Postgres{Host: "127.0.0.1", User: "postgres", Password: "admin-" + token(), Database: "postgres", cfg: cfg, bin: bin}
	if p.uid, p.gid, err = unprivileged(); err != nil {
		return nil, err
	}
	if p.dir, err = os.MkdirTemp("", "rekey-pg"); err != nil {
		return nil, err
	}
	p.SocketDir, p.LogFile = p.dir, filepath.Join(p.dir, "server.log")
	if err := p.create(); err != nil {
		_ = os.RemoveAll(p.dir)
		return nil, fmt.Errorf("create a PostgreSQL cluster: %w", err)
	}
	for range 5 { // the free port may be taken by another before the server has it
		if p.Port, err = freePort(); err != nil {
			break
		}
		if err = p.Start(); err == nil {
			return p, nil
		}
		if log, _ := p.Log(); !strings.Contains(log, "could not bind") {
			break
		}
	}
	_ = os.RemoveAll(p.dir)
	return nil, err
}

// DSN is a connection URL for a role, without TLS; with an empty password the URL has none.
func (p *Postgres) DSN(role, password, database string) string {
	login := role
	if password != "" {
		login += ":" + password
	}
	return fmt.Sprintf("postgres://%s@%s:%d/%s?sslmode=disable", login, p.Host, p.Port, database)
}

// AdminDSN is the superuser's connection URL.
func (p *Postgres) AdminDSN() string { return p.DSN(p.User, p.Password, p.Database) }

// Start starts a stopped or killed server again, on the same port and data, and returns when it accepts connections.
func (p *Postgres) Start() error {
	_ = os.Remove(p.pidFile()) // of a killed one; nobody else uses this folder
	out, err := os.OpenFile(p.LogFile, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(filepath.Join(p.bin, "postgres"), "-D", p.data(), "-p", strconv.Itoa(p.Port), "-k", p.SocketDir)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = p.dir, out, out, attributes(p.uid, p.gid)
	started, exited := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the server must not outlive the thread that started it, so that one must stay
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(exited)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	p.cmd, p.exited = cmd, exited
	deadline := time.Now().Add(p.cfg.Timeout)
	for !p.ready() {
		select {
		case <-exited:
			log, _ := p.Log()
			return fmt.Errorf("start PostgreSQL: it ended at once: %s", tail(log))
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.Kill()
			log, _ := p.Log()
			return fmt.Errorf("start PostgreSQL: not ready after %s: %s", p.cfg.Timeout, tail(log))
		}
	}
	return nil
}

// Stop ends the server and every session, and removes its data. It may be called twice.
func (p *Postgres) Stop() error {
	err := p.Halt()
	return errors.Join(err, os.RemoveAll(p.dir))
}

// Halt ends the server and every session and keeps its data for Start.
func (p *Postgres) Halt() error {
	if !p.running() {
		return nil
	}
	p.Resume()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGKILL} { // fast, immediate, at once
		_ = p.cmd.Process.Signal(sig)
		select {
		case <-p.exited:
			return nil
		case <-time.After(p.cfg.Timeout / 3):
		}
	}
	return fmt.Errorf("stop PostgreSQL: process %d does not end", p.cmd.Process.Pid)
}

// Kill ends the server as kill -9 does: nothing is flushed. Start recovers it.
func (p *Postgres) Kill() {
	if !p.running() {
		return
	}
	all := descendants(p.cmd.Process.Pid)
	_ = p.cmd.Process.Kill()
	<-p.exited
	for _, pid := range all {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, pid := range all { // a survivor would hold the shared memory that the next start needs
		for syscall.Kill(pid, 0) == nil && !zombie(pid) {
			time.Sleep(time.Millisecond)
		}
	}
}

// Pause stops the server and all its sessions in mid-air, as a hung machine would. Connections stay open and silent.
func (p *Postgres) Pause() { p.signal(syscall.SIGSTOP) }

// Resume undoes Pause.
func (p *Postgres) Resume() { p.signal(syscall.SIGCONT) }

// PID is the server's process; 0 when it does not run.
func (p *Postgres) PID() int {
	if !p.running() {
		return 0
	}
	return p.cmd.Process.Pid
}

// Log returns what the server has logged so far: every statement and connection.
func (p *Postgres) Log() (string, error) {
	b, err := os.ReadFile(p.LogFile)
	return string(b), err
}

// DataDir is where the server keeps its files, so that a test can search them for secrets.
func (p *Postgres) DataDir() string { return p.data() }

func (p *Postgres) data() string    { return filepath.Join(p.dir, "data") }
func (p *Postgres) pidFile() string { return filepath.Join(p.data(), "postmaster.pid") }

func (p *Postgres) running() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// ready reads the status line of postmaster.pid, so that no driver is needed. A replica is ready when it answers queries.
func (p *Postgres) ready() bool {
	b, err := os.ReadFile(p.pidFile())
	if err != nil {
		return false
	}
	lines := strings.Split(string(b), "\n")
	return len(lines) >= 8 && strings.TrimSpace(lines[7]) == "ready" && lines[0] == strconv.Itoa(p.cmd.Process.Pid)
}

func (p *Postgres) signal(sig syscall.Signal) {
	if !p.running() {
		return
	}
	_ = p.cmd.Process.Signal(sig)
	for _, pid := range descendants(p.cmd.Process.Pid) {
		_ = syscall.Kill(pid, sig)
	}
}

// create runs initdb and writes the configuration.
func (p *Postgres) create() error {
	if err := p.write(p.LogFile, nil); err != nil {
		return err
	}
	pw := filepath.Join(p.dir, "pw")
	if err := p.write(pw, []byte(p.Password)); err != nil {
		return err
	}
	if p.uid >= 0 {
		if err := os.Chown(p.dir, p.uid, p.gid); err != nil {
			return err
		}
	}
	method := "scram-sha-256"
	if p.cfg.Trust {
		method = "trust"
	}
	initdb := exec.Command(filepath.Join(p.bin, "initdb"), "-D", p.data(), "-U", p.User, "--pwfile", pw,
		"-A", method, "-E", "UTF8", "--locale", "C", "--no-sync")
	initdb.Dir, initdb.SysProcAttr = p.dir, attributes(p.uid, p.gid)
	initdb.SysProcAttr.Setpgid = false
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, tail(string(out)))
	}
	if err := os.Remove(pw); err != nil {
		return err
	}
	conf := []string{
		"listen_addresses = '127.0.0.1'", "password_encryption = 'scram-sha-256'", "max_connections = 60", "shared_buffers = '16MB'",
		"fsync = off", "log_statement = 'all'", "log_connections = on", "log_disconnections = on", "log_line_prefix = '%m [%p] %q%u@%d '",
	}
	if p.cfg.TLS {
		ca, cert, key, err := certificates()
		if err != nil {
			return err
		}
		p.CAFile = filepath.Join(p.dir, "ca.pem")
		if err := errors.Join(p.write(p.CAFile, ca), p.write(p.dir+"/server.pem", cert), p.write(p.dir+"/server.key", key)); err != nil {
			return err
		}
		conf = append(conf, "ssl = on", "ssl_cert_file = '"+p.dir+"/server.pem'", "ssl_key_file = '"+p.dir+"/server.key'")
	}
	for _, k := range sortedKeys(p.cfg.Settings) {
		conf = append(conf, k+" = '"+strings.ReplaceAll(p.cfg.Settings[k], "'", "''")+"'")
	}
	hba := append(slices.Clone(p.cfg.HBA), "local all all "+method, "host all all 127.0.0.1/32 "+method, "host replication all 127.0.0.1/32 "+method)
	return errors.Join(
		p.add(filepath.Join(p.data(), "postgresql.conf"), conf),
		p.write(filepath.Join(p.data(), "pg_hba.conf"), []byte(strings.Join(hba, "\n")+"\n")))
}

func (p *Postgres) write(path string, b []byte) error {
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return err
	}
	if p.uid < 0 {
		return nil
	}
	return os.Chown(path, p.uid, p.gid)
}

func (p *Postgres) add(path string, lines []string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return p.write(path, append(old, []byte("\n"+strings.Join(lines, "\n")+"\n")...))
}

// findPostgres is the folder of initdb and postgres: from PATH, else the newest where distributions put them.
var findPostgres = sync.OnceValues(func() (string, error) {
	dirs := filepath.SplitList(os.Getenv("PATH"))
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/local/pgsql/bin"} {
		found, _ := filepath.Glob(pattern)
		slices.SortFunc(found, func(a, b string) int { return version(b) - version(a) })
		dirs = append(dirs, found...)
	}
	for _, dir := range dirs {
		if executable(filepath.Join(dir, "initdb")) && executable(filepath.Join(dir, "postgres")) {
			return dir, nil
		}
	}
	return "", errors.New("no initdb and postgres in PATH or in the usual folders; on Debian: apt-get install postgresql")
})

// version is the first number in a folder's name.
func version(dir string) int {
	digits := strings.FieldsFunc(dir, func(r rune) bool { return r < '0' || r > '9' })
	if len(digits) == 0 {
		return 0
	}
	n, _ := strconv.Atoi(digits[0])
	return n
}

func executable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}

// unprivileged is the user to run as; -1 if that is ourselves.
func unprivileged() (uid, gid int, err error) {
	if os.Geteuid() != 0 {
		return -1, -1, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		if u, err := user.Lookup(name); err == nil {
			uid, err1 := strconv.Atoi(u.Uid)
			gid, err2 := strconv.Atoi(u.Gid)
			return uid, gid, errors.Join(err1, err2)
		}
	}
	return 0, 0, errors.New("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
