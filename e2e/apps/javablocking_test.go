// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/podshunt/podshunt/api"
	"github.com/podshunt/podshunt/e2e/sandboxtest"
)

// javaBlocking are requests and answers as of JDBC, over Java's blocking sockets: each
// connection has a thread at both ends, which sleeps in recv. Where recv returns EAGAIN,
// Java waits by poll and reads again.
const javaBlocking = `
import java.io.*;
import java.net.*;
import java.nio.ByteBuffer;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;
import java.util.zip.CRC32;

public class Blocking {
	// A request is an int each for its kind, its body's size, a seed, and the size of the answer, and then the body.
	// The answer is the checksum of the body, and bytes of another seed.
	static final int ASK = 0;
	static final int RESET = 1; // no answer: the server resets the connection
	static final int AFTER_TIMEOUT = 2; // the answer comes once the client has sent one more byte
	static final int LAST = 3; // the answer comes after the end of the client's stream
	static final int REPORT = 4; // the answer says how all other connections have ended

	static final ConcurrentSkipListMap<String, Integer> ends = new ConcurrentSkipListMap<>();
	static final AtomicInteger open = new AtomicInteger();

	static byte[] content(int seed, int size) {
		byte[] bytes = new byte[size];
		new Random(seed).nextBytes(bytes);
		return bytes;
	}

	static int checksum(byte[] bytes) {
		CRC32 crc = new CRC32();
		crc.update(bytes);
		return (int) crc.getValue();
	}

	// Reads up to 8 KiB at a time, as drivers do.
	static class Input {
		final InputStream in;
		final byte[] buffer = new byte[8192];
		int next, end;

		Input(Socket socket) throws IOException { in = socket.getInputStream(); }

		// Returns null at the end of the stream.
		byte[] read(int size) throws IOException {
			byte[] bytes = new byte[size];
			for (int n = 0; n < size; ) {
				if (next == end) {
					next = 0;
					end = 0;
					int got = in.read(buffer, 0, buffer.length);
					if (got < 0 && n == 0)
						return null;
					if (got < 0)
						throw new EOFException(n + " of " + size + " bytes");
					end = got;
				}
				int some = Math.min(size - n, end - next);
				System.arraycopy(buffer, next, bytes, n, some);
				next += some;
				n += some;
			}
			return bytes;
		}
	}

	static void end(String how) { ends.merge(how, 1, Integer::sum); }

	static void answer(Socket socket, int body, int seed, int size) throws IOException {
		byte[] bytes = content(~seed, size);
		socket.getOutputStream().write(ByteBuffer.allocate(4 + size).putInt(body).put(bytes).array());
	}

	static String serve(Socket socket) {
		try (socket) {
			socket.setTcpNoDelay(true);
			Input in = new Input(socket);
			for (;;) {
				byte[] header = in.read(16);
				if (header == null)
					return "end of stream";
				ByteBuffer fields = ByteBuffer.wrap(header);
				int kind = fields.getInt(), size = fields.getInt(), seed = fields.getInt(), answer = fields.getInt();
				byte[] body = in.read(size);
				if (!Arrays.equals(body, content(seed, size)))
					return "request differs";
				switch (kind) {
				case RESET:
					socket.setSoLinger(true, 0);
					return "reset";
				case AFTER_TIMEOUT:
					if (in.read(1) == null)
						return "end of stream instead of a byte";
					break;
				case LAST:
					if (in.read(1) != null)
						return "a byte instead of the end of stream";
					answer(socket, checksum(body), seed, answer);
					return "last answer";
				case REPORT:
					while (open.get() > 1)
						Thread.sleep(1);
					byte[] text = ends.toString().getBytes();
					ends.clear();
					socket.getOutputStream().write(ByteBuffer.allocate(4 + text.length).putInt(text.length).put(text).array());
					return "report";
				}
				answer(socket, checksum(body), seed, answer);
			}
		} catch (Exception e) {
			return e.toString();
		}
	}

	static void server(int port) throws Exception {
		try (ServerSocket listener = new ServerSocket(port, 100)) {
			for (;;) {
				Socket socket = listener.accept();
				open.incrementAndGet();
				new Thread(() -> {
					String how = serve(socket);
					if (!how.equals("report"))
						end(how);
					open.decrementAndGet();
				}).start();
			}
		}
	}

	// One connection of the client.
	static class Client implements Closeable {
		static final AtomicLong requests = new AtomicLong(), bytes = new AtomicLong();
		final Socket socket;
		final Input in;
		final Random random;
		final int most;

		Client(String host, int port, long seed, int most) throws IOException {
			socket = new Socket(host, port);
			socket.setTcpNoDelay(true);
			in = new Input(socket);
			random = new Random(seed);
			this.most = most;
		}

		int size() { return random.nextInt(random.nextInt(20) == 0 ? most : Math.min(most, 2000)); }

		byte[] send(int kind, int answer, int seed) throws IOException {
			byte[] body = content(seed, size());
			socket.getOutputStream().write(ByteBuffer.allocate(16 + body.length)
				.putInt(kind).putInt(body.length).putInt(seed).putInt(answer).put(body).array());
			requests.incrementAndGet();
			bytes.addAndGet(body.length + answer);
			return body;
		}

		void ask(int kind) throws Exception {
			int answer = size(), seed = random.nextInt();
			byte[] body = send(kind, answer, seed);
			if (kind == AFTER_TIMEOUT) {
				socket.setSoTimeout(1 + random.nextInt(20));
				try {
					in.read(1);
					throw new IOException("an answer before the byte that it waits for");
				} catch (SocketTimeoutException e) {
					socket.setSoTimeout(0);
				}
				socket.getOutputStream().write(1);
			}
			if (kind == LAST)
				socket.shutdownOutput();
			byte[] sum = in.read(4);
			if (sum == null)
				throw new EOFException("no answer");
			if (ByteBuffer.wrap(sum).getInt() != checksum(body))
				throw new IOException("the server has got another body");
			if (!Arrays.equals(in.read(answer), content(~seed, answer)))
				throw new IOException("answer differs");
			if (kind == LAST && in.read(1) != null)
				throw new IOException("a byte after the last answer");
		}

		void wantFailure(String want) throws IOException {
			try {
				byte[] got = in.read(1);
				end(got == null ? "end of stream" : "a byte");
			} catch (SocketException e) {
				end(e.getMessage());
			}
		}

		public void close() throws IOException { socket.close(); }
	}

	static void connection(String mode, String host, int port, long seed) throws Exception {
		int most = mode.equals("large") ? 1 << 20 : 40000;
		try (Client c = new Client(host, port, seed, most)) {
			int requests = switch (mode) {
				case "steady", "signals" -> 250;
				case "large" -> 60;
				default -> 40;
			};
			for (int i = 0; i < requests; i++)
				c.ask(mode.equals("timeouts") && i % 8 == 7 ? AFTER_TIMEOUT : ASK);
			switch (mode) {
			case "half-closes" -> c.ask(LAST);
			case "resets" -> {
				if (seed % 2 == 0) {
					c.send(RESET, 0, 1);
					c.wantFailure("Connection reset");
				} else {
					c.socket.setSoLinger(true, 0);
				}
			}
			case "closes" -> {
				Thread other = new Thread(() -> {
					try {
						Thread.sleep(c.random.nextInt(3));
						c.close();
					} catch (Exception e) {
						end("close: " + e);
					}
				});
				other.start();
				c.wantFailure("Socket closed");
				other.join();
			}
			}
			end("done");
		} catch (Exception e) {
			end(e.toString());
		}
	}

	static void client(String host, int port, String mode) throws Exception {
		final int threads = 6, connections = 8;
		Thread[] all = new Thread[threads];
		for (int i = 0; i < threads; i++) {
			int first = i * connections;
			all[i] = new Thread(() -> {
				for (int j = 0; j < connections; j++)
					try {
						connection(mode, host, port, first + j);
					} catch (Exception e) {
						end(e.toString());
					}
			});
			all[i].start();
		}
		for (Thread t : all)
			t.join();
		try (Client c = new Client(host, port, 0, 1)) {
			c.send(REPORT, 0, 0);
			String report = new String(c.in.read(ByteBuffer.wrap(c.in.read(4)).getInt()));
			System.out.println(mode + ": " + Client.requests + " requests, " + Client.bytes + " bytes, client " + ends + ", server " + report);
		}
	}

	public static void main(String[] args) throws Exception {
		if (args[0].equals("server"))
			server(Integer.parseInt(args[1]));
		else
			client(args[1], Integer.parseInt(args[2]), args[3]);
	}
}
`

// blockingModes are what the clients of javaBlocking do after, or between, some requests.
func blockingModes() []string {
	return []string{"steady", "signals", "resets", "half-closes", "timeouts", "closes", "large"}
}

// TestJavaBlocking: Java's blocking sockets take part where both pods say so, although
// the hazard blocking-recv is not accepted on the node. Whatever wakes their recv, each
// byte arrives, and each connection ends as on TCP.
func TestJavaBlocking(t *testing.T) {
	n := mustNode(t)
	const accept = optedIn + ", " + api.AnnotationBlockingSockets + ": accept"
	status := n.mustStart(t, map[string]string{
		"one/client": accept, "one/server": optedIn,
		"both/client": accept, "both/server": accept,
	}, sandboxtest.AcceptFatal, "--join-after=0") // so that all bytes of a connection are counted
	if want := []string{"fionread-tcp", "fionread-redirected", "splice"}; !gocmp.Equal(status.AcceptedHazards, want) {
		t.Fatalf("got accepted hazards %v, want %v", status.AcceptedHazards, want)
	}
	var answers [][]string
	for _, namespace := range []string{"one", "both"} {
		t.Run(namespace, func(t *testing.T) {
			s := newStage(t, n, n.mustCast(t, namespace))
			java := s.java("Blocking", javaBlocking)
			address, server := s.serveProcess(s.server, recordsPort, syscall.SIGTERM, "java", append(java, "server", fmt.Sprint(recordsPort))...)
			for _, mode := range blockingModes() {
				before := n.MustStatus(t)
				began := time.Now()
				s.answer("%s", s.javaClient(server, mode, append(java, "client", address.Addr().String(), fmt.Sprint(recordsPort), mode)...))
				after := n.MustStatus(t)
				got, evicted := between(before, after), evictions(after)-evictions(before)
				t.Logf("%s %v: %+v, %s by shortcut, %d sockets evicted", mode, time.Since(began).Round(time.Millisecond), got, got.share(), evicted)
				if namespace == "one" {
					if got != (traffic{}) {
						t.Errorf("%s: got %+v, want nothing without the consent of both pods", mode, got)
					}
					continue
				}
				// To close a socket, Java first shuts down writing, which evicts the client's. Large
				// requests fill TCP's send buffer, which evicts all others.
				const connections = 49
				if got.paired != connections || got.shortcut == 0 || mode != "large" && (4*got.shortcut < 3*got.sent || evicted > connections) {
					t.Errorf("%s: got %+v and %d sockets evicted, want %d connections paired, which stay on the shortcut until they are closed", mode, got, evicted, connections)
				}
			}
			answers = append(answers, s.answers)
			t.Log(s.answers)
		})
	}
	if len(answers) == 2 {
		if diff := gocmp.Diff(answers[0], answers[1]); diff != "" {
			t.Errorf("answers (-tcp +shortcut):\n%s", diff)
		}
	}
}

func evictions(s api.Status) uint64 {
	for _, o := range s.Outcomes {
		if o.String() == "socket_evicted" {
			return o.Count
		}
	}
	return 0
}

// javaClient runs a client to its end and returns what it prints. Meanwhile, with the mode
// "signals", signals wake the threads of both programs.
func (s *stage) javaClient(server *os.Process, mode string, args ...string) string {
	s.Helper()
	cmd := s.command("java", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	s.must("start the client", s.client.Start(cmd))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	signals := 0
	for round := 0; ; round++ {
		select {
		case err := <-ended:
			if err != nil {
				s.Fatalf("%s: %v\n%s%s", mode, err, tail(stdout.Bytes()), tail(stderr.Bytes()))
			}
			if mode == "signals" {
				s.Logf("%d signals", signals)
				if signals < 1000 {
					s.Errorf("got %d signals, want many", signals)
				}
			}
			return stdout.String()
		case <-time.After(200 * time.Microsecond):
		}
		if mode != "signals" {
			continue
		}
		for _, p := range []*os.Process{cmd.Process, server} {
			sent, err := wakeThreads(p.Pid)
			s.check("wake threads", err)
			signals += sent
			if round%100 == 0 {
				s.check("stop", p.Signal(unix.SIGSTOP))
				s.check("continue", p.Signal(unix.SIGCONT))
			}
		}
	}
}

// wakeUp is the signal by which Java wakes its own threads that sleep in the kernel
// (NativeThread: SIGRTMAX-2). Its handler does nothing.
const wakeUp = unix.Signal(62)

var caughtSignals = regexp.MustCompile(`(?m)^SigCgt:\t([0-9a-f]+)$`)

// wakeThreads sends wakeUp to each thread of a process that handles it, and returns how
// many there were.
func wakeThreads(pid int) (sent int, err error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, nil // it has ended
	}
	if err != nil {
		return 0, err
	}
	found := caughtSignals.FindSubmatch(status)
	if found == nil {
		return 0, nil
	}
	caught, err := strconv.ParseUint(string(found[1]), 16, 64)
	if err != nil || caught&(1<<(wakeUp-1)) == 0 {
		return 0, err
	}
	threads, err := os.ReadDir(filepath.Join(dir, "task"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return sent, err
		}
		switch err := unix.Tgkill(pid, tid, wakeUp); {
		case err == nil:
			sent++
		case !errors.Is(err, unix.ESRCH):
			return sent, err
		}
	}
	return sent, nil
}
