//go:build unix

package testserver

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// NATSConfig says how a server is started. The zero value is one node without TLS that syncs every write.
type NATSConfig struct {
	// Nodes is 1, or 3 for a cluster; 1 if zero.
	Nodes int
	// TLS turns on TLS for clients, with a certificate signed by the CA in CAFile.
	TLS bool
	// LazySync leaves the server's default: writes are synced every two minutes.
	LazySync bool
	// Timeout bounds a start or a stop; 60 s if zero.
	Timeout time.Duration
}

// NATS is one running nats-server process with JetStream, or a cluster of three. Nobody gets in without the creds file. Its
// methods are not for concurrent use.
type NATS struct {
	URL       string // of all nodes
	CredsFile string // of a user that may do everything in its account
	CAFile    string // PEM; empty without TLS

	cfg   NATSConfig
	bin   string
	dir   string
	nodes []*natsNode
}

type natsNode struct {
	name   string
	port   int
	config string
	log    string
	cmd    *exec.Cmd
	exited chan struct{}
}

// StartNATS starts it on private loopback ports, with its data in a temporary folder. The program is built from the version in
// go.mod at the first use. The caller must Stop it; on Linux it also ends with the process that started it.
func StartNATS(cfg NATSConfig) (*NATS, error) {
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Minute
	}
	if cfg.Nodes == 0 {
		cfg.Nodes = 1
	}
	bin, err := findNATS()
	if err != nil {
		return nil, err
	}
	n := &NATS{cfg: cfg, bin: bin}
	if n.dir, err = os.MkdirTemp("", "rekey-nats"); err != nil {
		return nil, err
	}
	for range 5 { // a free port may be taken by another before the server has it
		if err = n.configure(); err != nil {
			break
		}
		if err = n.startAll(); err == nil {
			return n, nil
		}
		if !strings.Contains(err.Error(), "address already in use") {
			break
		}
		_ = n.haltAll()
	}
	return nil, errors.Join(err, n.Stop())
}

// Start starts a halted or killed node again, on the same port and data.
func (n *NATS) Start(node int) error {
	if err := n.launch(n.nodes[node]); err != nil {
		return err
	}
	return n.await(n.nodes[node])
}

// Halt ends a node cleanly and keeps its data.
func (n *NATS) Halt(node int) error {
	x := n.nodes[node]
	if !x.running() {
		return nil
	}
	n.Resume(node)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		_ = x.cmd.Process.Signal(sig)
		select {
		case <-x.exited:
			return nil
		case <-time.After(n.cfg.Timeout / 2):
		}
	}
	return fmt.Errorf("stop %s: process %d does not end", x.name, x.cmd.Process.Pid)
}

// Kill ends a node as kill -9 does.
func (n *NATS) Kill(node int) {
	if x := n.nodes[node]; x.running() {
		_ = x.cmd.Process.Kill()
		<-x.exited
	}
}

// Pause stops a node in mid-air, as a hung machine would. Connections stay open and silent.
func (n *NATS) Pause(node int) {
	n.signal(node, syscall.SIGSTOP)
	pid := n.PID(node)
	for deadline := time.Now().Add(5 * time.Second); pid != 0 && !stopped(pid) && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond) // the signal was sent, not yet obeyed by every thread
	}
}

// Resume undoes Pause.
func (n *NATS) Resume(node int) { n.signal(node, syscall.SIGCONT) }

// PID is a node's process; 0 when it does not run.
func (n *NATS) PID(node int) int {
	if x := n.nodes[node]; x.running() {
		return x.cmd.Process.Pid
	}
	return 0
}

// Named is the number of the node with this server name, -1 if there is none.
func (n *NATS) Named(server string) int {
	for i, x := range n.nodes {
		if x.name == server {
			return i
		}
	}
	return -1
}

// Log returns what a node has logged since its last start.
func (n *NATS) Log(node int) (string, error) {
	b, err := os.ReadFile(n.nodes[node].log)
	return string(b), err
}

// DataDir is where a node keeps its files, so that a test can search them.
func (n *NATS) DataDir(node int) string { return filepath.Join(n.dir, n.nodes[node].name) }

// Stop ends every node and removes the data. It may be called twice.
func (n *NATS) Stop() error { return errors.Join(n.haltAll(), os.RemoveAll(n.dir)) }

func (n *NATS) haltAll() error {
	var errs []error
	for i := range n.nodes {
		errs = append(errs, n.Halt(i))
	}
	return errors.Join(errs...)
}

func (n *NATS) signal(node int, sig syscall.Signal) {
	if x := n.nodes[node]; x.running() {
		_ = x.cmd.Process.Signal(sig)
	}
}

func (n *NATS) startAll() error {
	for _, x := range n.nodes {
		if err := n.launch(x); err != nil {
			return err
		}
	}
	for _, x := range n.nodes { // a cluster is ready together
		if err := n.await(x); err != nil {
			return err
		}
	}
	return nil
}

func (n *NATS) launch(x *natsNode) error {
	out, err := os.Create(x.log)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(n.bin, "-c", x.config)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = n.dir, out, out, attributes(-1, -1)
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
		return fmt.Errorf("start %s: %w", x.name, err)
	}
	x.cmd, x.exited = cmd, exited
	return nil
}

// await waits until the node serves clients and, in a cluster, knows a leader.
func (n *NATS) await(x *natsNode) error {
	for deadline := time.Now().Add(n.cfg.Timeout); ; {
		b, _ := os.ReadFile(x.log)
		log := string(b)
		leader := n.cfg.Nodes == 1 || strings.Contains(log, "JetStream cluster new metadata leader") ||
			strings.Contains(log, "Self is new JetStream cluster metadata leader")
		if leader && strings.Contains(log, "Server is ready") {
			return nil
		}
		select {
		case <-x.exited:
			b, _ := os.ReadFile(x.log)
			return fmt.Errorf("start %s: it ended at once: %s", x.name, tail(string(b)))
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("start %s: not ready after %s: %s", x.name, n.cfg.Timeout, tail(log))
		}
	}
}

func (x *natsNode) running() bool {
	if x.cmd == nil {
		return false
	}
	select {
	case <-x.exited:
		return false
	default:
		return true
	}
}

// configure chooses ports and writes the nodes' configurations and the creds file.
func (n *NATS) configure() error {
	trust, creds, err := natsIdentities()
	if err != nil {
		return err
	}
	n.CredsFile = filepath.Join(n.dir, "user.creds")
	if err := os.WriteFile(n.CredsFile, creds, 0o600); err != nil {
		return err
	}
	tls, scheme := "", "nats"
	if n.cfg.TLS {
		ca, cert, key, err := certificates()
		if err != nil {
			return err
		}
		n.CAFile, scheme = filepath.Join(n.dir, "ca.pem"), "tls"
		certFile, keyFile := filepath.Join(n.dir, "server.pem"), filepath.Join(n.dir, "server.key")
		if err := errors.Join(os.WriteFile(n.CAFile, ca, 0o600), os.WriteFile(certFile, cert, 0o600), os.WriteFile(keyFile, key, 0o600)); err != nil {
			return err
		}
		tls = fmt.Sprintf("tls { cert_file: %q, key_file: %q }\n", certFile, keyFile)
	}
	sync := "sync_interval: always"
	if n.cfg.LazySync {
		sync = ""
	}
	n.nodes = nil
	var routes, urls []string
	var routePorts []int
	for i := range n.cfg.Nodes {
		port, err1 := freePort()
		route, err2 := freePort()
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		name := "n" + strconv.Itoa(i)
		n.nodes = append(n.nodes, &natsNode{name: name, port: port, config: filepath.Join(n.dir, name+".conf"), log: filepath.Join(n.dir, name+".log")})
		urls = append(urls, fmt.Sprintf("%s://127.0.0.1:%d", scheme, port))
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", route))
		routePorts = append(routePorts, route)
	}
	n.URL = strings.Join(urls, ",")
	for i, x := range n.nodes {
		conf := fmt.Sprintf("server_name: %s\nlisten: 127.0.0.1:%d\n%sjetstream { store_dir: %q, max_file_store: 1TB, %s }\n%s",
			x.name, x.port, tls, filepath.Join(n.dir, x.name), sync, trust)
		if n.cfg.Nodes > 1 {
			conf += fmt.Sprintf("cluster { name: rekey, listen: 127.0.0.1:%d, routes: [%s] }\n", routePorts[i], strings.Join(routes, ", "))
		}
		if err := os.WriteFile(x.config, []byte(conf), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// natsIdentities makes an operator with a system account and one account with JetStream, and a user of the latter.
func natsIdentities() (trust string, creds []byte, err error) {
	var errs []error
	key := func(create func() (nkeys.KeyPair, error)) (nkeys.KeyPair, string) {
		kp, err := create()
		if err != nil {
			errs = append(errs, err)
			return nil, ""
		}
		pub, err := kp.PublicKey()
		errs = append(errs, err)
		return kp, pub
	}
	operator, operatorPub := key(nkeys.CreateOperator)
	_, systemPub := key(nkeys.CreateAccount)
	account, accountPub := key(nkeys.CreateAccount)
	user, userPub := key(nkeys.CreateUser)
	if err := errors.Join(errs...); err != nil {
		return "", nil, err
	}
	oc := jwt.NewOperatorClaims(operatorPub)
	oc.SystemAccount = systemPub
	ac := jwt.NewAccountClaims(accountPub)
	ac.Limits.JetStreamLimits = jwt.JetStreamLimits{
		MemoryStorage: jwt.NoLimit, DiskStorage: jwt.NoLimit, Streams: jwt.NoLimit, Consumer: jwt.NoLimit, MaxAckPending: jwt.NoLimit,
	}
	operatorJWT, err1 := oc.Encode(operator)
	systemJWT, err2 := jwt.NewAccountClaims(systemPub).Encode(operator)
	accountJWT, err3 := ac.Encode(operator)
	userJWT, err4 := jwt.NewUserClaims(userPub).Encode(account)
	seed, err5 := user.Seed()
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return "", nil, err
	}
	creds, err = jwt.FormatUserConfig(userJWT, seed)
	trust = fmt.Sprintf("operator: %s\nsystem_account: %s\nresolver: MEMORY\nresolver_preload: { %s: %s, %s: %s }\n",
		operatorJWT, systemPub, systemPub, systemJWT, accountPub, accountJWT)
	return trust, creds, err
}

const natsModule = "github.com/nats-io/nats-server/v2"

// findNATS is the nats-server program of the version in go.mod, built into the user's cache unless it is there.
var findNATS = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", natsModule).Output()
	if err != nil {
		return "", fmt.Errorf("find the version of nats-server: go list, inside this module: %w", err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "rekey-testserver")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "nats-server-"+strings.TrimSpace(string(out)))
	lock, err := os.OpenFile(bin+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // another process may be building it
		return "", err
	}
	if executable(bin) {
		return bin, nil
	}
	if out, err := exec.Command("go", "build", "-o", bin+".new", natsModule).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build nats-server: %w: %s", err, tail(string(out)))
	}
	return bin, os.Rename(bin+".new", bin)
})
