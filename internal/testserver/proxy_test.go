package testserver_test

import (
	"bufio"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/rekeyhq/rekey/internal/testserver"
)

// echo answers each line with the same line and remembers it.
type echo struct {
	net.Listener
	mu    sync.Mutex
	heard []string
}

func (e *echo) serve() {
	for {
		c, err := e.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for s := bufio.NewScanner(c); s.Scan(); {
				e.mu.Lock()
				e.heard = append(e.heard, s.Text())
				e.mu.Unlock()
				_, _ = io.WriteString(c, s.Text()+"\n")
			}
		}()
	}
}

func TestProxyLosesWhatItIsToldTo(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{Listener: l}
	go e.serve()
	defer l.Close()
	p, err := testserver.NewProxy("127.0.0.1", l.Addr().(*net.TCPAddr).Port)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	say := func(line string) (answer string, err error) {
		c, err := net.Dial("tcp", net.JoinHostPort(p.Host, strconv.Itoa(p.Port)))
		if err != nil {
			return "", err
		}
		defer c.Close()
		if _, err := io.WriteString(c, line+"\n"); err != nil {
			return "", err
		}
		answer, err = bufio.NewReader(c).ReadString('\n')
		return strings.TrimSpace(answer), err
	}
	if got, err := say("one"); got != "one" || err != nil {
		t.Fatalf("relayed %q, %v", got, err)
	}
	p.LoseRequest("two")
	if got, err := say("two"); got != "" || err == nil {
		t.Fatalf("a lost request was answered: %q, %v", got, err)
	}
	p.LoseReply("three", "ee")
	if got, err := say("three"); got != "" || err == nil {
		t.Fatalf("a lost reply arrived: %q, %v", got, err)
	}
	p.Cut()
	if got, err := say("four"); got != "" || err == nil {
		t.Fatalf("a cut proxy answered: %q, %v", got, err)
	}
	p.Mend()
	if got, err := say("five"); got != "five" || err != nil {
		t.Fatalf("after Mend: %q, %v", got, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if got := strings.Join(e.heard, " "); got != "one three five" || p.Pending() {
		t.Fatalf("the server heard %q", got)
	}
}

func TestProxyHoldsWhatItIsToldTo(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{Listener: l}
	go e.serve()
	defer l.Close()
	p, err := testserver.NewProxy("127.0.0.1", l.Addr().(*net.TCPAddr).Port)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, err := net.Dial("tcp", net.JoinHostPort(p.Host, strconv.Itoa(p.Port)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	release, caught := make(chan struct{}), make(chan net.Addr, 1)
	p.Watch(func(client net.Addr, request []byte) <-chan struct{} {
		if !strings.Contains(string(request), "hold me") {
			return nil
		}
		caught <- client
		return release
	})
	say := func(line string) {
		t.Helper()
		if _, err := io.WriteString(c, line+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	say("one")
	if got, err := in.ReadString('\n'); got != "one\n" || err != nil {
		t.Fatalf("relayed %q, %v", got, err)
	}
	say("hold me")
	if from := <-caught; from.String() != c.LocalAddr().String() {
		t.Errorf("caught %s, sent by %s", from, c.LocalAddr())
	}
	e.mu.Lock()
	if n := len(e.heard); n != 1 {
		t.Errorf("the server heard %q", e.heard)
	}
	e.mu.Unlock()
	close(release)
	if got, err := in.ReadString('\n'); got != "hold me\n" || err != nil {
		t.Fatalf("after the release %q, %v", got, err)
	}
}
