//go:build linux

package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/api"
)

// process is one running engine process. Its standard error goes to a file that all runs of the same name share.
type process struct {
	t      *testing.T
	name   string
	config string
	log    string
	cmd    *exec.Cmd
	exited chan struct{}
}

// run starts `rekey <role> --config <config>`. It is killed at the end of the test, if it still runs, and with the test's own process.
func (s *site) run(name, role, config string) *process {
	s.t.Helper()
	p := &process{t: s.t, name: name, config: config, log: filepath.Join(s.dir, name+".log")}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer out.Close()
	p.cmd = exec.Command(s.bin, role, "--config", config)
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.Env = out, out, append(environment(), s.env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Credential: s.user}
	started := make(chan error)
	p.exited = make(chan struct{})
	go func() {
		runtime.LockOSThread() // the child ends with the thread that started it
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait()
		}
		close(p.exited)
	}()
	if err := <-started; err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(p.kill)
	if !s.logged[name] {
		s.logged[name] = true
		s.t.Cleanup(func() {
			if s.t.Failed() {
				s.t.Logf("the end of %s's log:\n%s", name, tail(p.text()))
			}
		})
	}
	return p
}

// environment is ours without what would change the program's configuration.
func environment() []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "REKEY_") && !strings.HasPrefix(kv, "PG") {
			env = append(env, kv)
		}
	}
	return env
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// kill is kill -9.
func (p *process) kill() {
	if p.running() {
		_ = p.cmd.Process.Kill()
	}
	<-p.exited
}

func (p *process) signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// text is everything that the runs of this name wrote.
func (p *process) text() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		p.t.Error(err)
	}
	return string(b)
}

// end waits for the process and returns its exit code.
func (p *process) end(within time.Duration) int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(within):
		p.t.Fatalf("%s does not end within %s", p.name, within)
	}
	return p.cmd.ProcessState.ExitCode()
}

// ready waits until the server says that it can do its work.
func (s *site) ready(p *process) {
	s.t.Helper()
	eventually(s.t, 60*time.Second, p.name+" becomes ready", func() (bool, string) {
		if !p.running() {
			s.t.Fatalf("%s ended:\n%s", p.name, tail(p.text()))
		}
		c, err := api.NewClient(api.ClientConfig{Address: s.listen(p.config), Timeout: 5 * time.Second})
		if err != nil {
			s.t.Fatal(err)
		}
		r, err := c.Ready(s.t.Context())
		if err != nil {
			return false, err.Error()
		}
		return r.Ready, strings.Join(values(r.Checks), ", ")
	})
}

func values(m map[string]string) []string {
	var vs []string
	for k, v := range m {
		vs = append(vs, k+": "+v)
	}
	return vs
}

// result is what one command said.
type result struct {
	code        int
	out, errors string
}

func (r result) all() string { return r.out + r.errors }

// cli runs a command with the configuration to its end, for at most two minutes. What it says is searched for secrets later.
func (s *site) cli(config string, args ...string) result {
	s.t.Helper()
	r := s.quietly(config, args...)
	s.said.add(r.all())
	return r
}

// quietly is cli for a command that is to say a secret.
func (s *site) quietly(config string, args ...string) result {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.bin, append(args, "--config", config)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Env, cmd.Dir = &out, &errs, environment(), s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.user}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("rekey %v: %v", args, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// must is cli, with exit code 0.
func (s *site) must(config string, args ...string) string {
	s.t.Helper()
	r := s.cli(config, args...)
	if r.code != 0 {
		s.t.Fatalf("rekey %v: exit code %d\n%s", args, r.code, r.all())
	}
	return r.out
}

// tail is the end of a text, for a failure.
func tail(s string) string {
	const most = 6000
	if len(s) > most {
		return "…" + s[len(s)-most:]
	}
	return s
}
