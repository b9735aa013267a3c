// SPDX-License-Identifier: Apache-2.0

package apps_test

import (
	"fmt"
	"path/filepath"
	"syscall"
)

// javaPrograms are the exchange's server and client, and a protocol of records as
// JDBC drivers have: its client's socket is in blocking mode, until a read with
// a timeout makes Java take it out of it, and it asks available(), which is
// FIONREAD, before it reads more.
const javaPrograms = `
import com.sun.net.httpserver.HttpServer;
import java.io.*;
import java.net.*;
import java.net.http.*;
import java.nio.file.*;
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.Executors;

public class Programs {
	static String digest(byte[] body) throws Exception {
		return body.length + " bytes, sha256 " + HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(body));
	}

	static void httpServer(int port) throws Exception {
		HttpServer server = HttpServer.create(new InetSocketAddress("0.0.0.0", port), 0);
		server.setExecutor(Executors.newFixedThreadPool(4));
		server.createContext("/", exchange -> {
			try (exchange) {
				byte[] body = exchange.getRequestBody().readAllBytes();
				byte[] answer = exchange.getRequestMethod().equals("PUT") ? digest(body).getBytes()
					: Files.readAllBytes(Path.of("shelf").resolve(exchange.getRequestURI().getPath().substring(1)));
				exchange.sendResponseHeaders(200, answer.length == 0 ? -1 : answer.length);
				if (answer.length > 0)
					exchange.getResponseBody().write(answer);
			} catch (Exception e) {
				e.printStackTrace();
			}
		});
		server.start();
	}

	static void httpClient(String url, Path shelf, List<String> names) throws Exception {
		HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
		for (String name : names) {
			URI uri = URI.create(url + "/" + name);
			HttpResponse<byte[]> got = client.send(HttpRequest.newBuilder(uri).build(), HttpResponse.BodyHandlers.ofByteArray());
			System.out.println("GET " + name + ": " + digest(got.body()));
			HttpResponse<String> put = client.send(HttpRequest.newBuilder(uri)
				.PUT(HttpRequest.BodyPublishers.ofFile(shelf.resolve(name))).build(), HttpResponse.BodyHandlers.ofString());
			System.out.println("PUT " + name + ": " + put.body());
		}
	}

	// The older client of Java's own, whose socket is in blocking mode.
	static void urlConnection(String url, Path shelf, List<String> names) throws Exception {
		for (String name : names) {
			for (String method : List.of("GET", "PUT")) {
				HttpURLConnection connection = (HttpURLConnection) new URL(url + "/" + name).openConnection();
				connection.setRequestMethod(method);
				if (method.equals("PUT")) {
					byte[] body = Files.readAllBytes(shelf.resolve(name));
					connection.setDoOutput(true);
					connection.setFixedLengthStreamingMode(body.length);
					connection.getOutputStream().write(body);
				}
				byte[] answer = connection.getInputStream().readAllBytes();
				System.out.println(method + " " + name + ": " + (method.equals("PUT") ? new String(answer) : digest(answer)));
			}
		}
	}

	static byte[] record(int i) {
		byte[] body = new byte[i % 20 == 19 ? 300000 + i : i * 13];
		new Random(i).nextBytes(body);
		return body;
	}

	static final int RECORDS = 80;

	// Sends each record back, and then a short one at once.
	static void recordServer(int port) throws Exception {
		try (ServerSocket listener = new ServerSocket(port)) {
			for (;;) {
				Socket socket = listener.accept();
				new Thread(() -> {
					try (socket) {
						DataInputStream in = new DataInputStream(new BufferedInputStream(socket.getInputStream()));
						DataOutputStream out = new DataOutputStream(new BufferedOutputStream(socket.getOutputStream()));
						for (;;) {
							byte[] body = new byte[in.readInt()];
							in.readFully(body);
							out.writeInt(body.length);
							out.write(body);
							out.flush();
							out.writeInt(1);
							out.write(body.length & 0x7f);
							out.flush();
						}
					} catch (EOFException e) {
						// The client is done.
					} catch (IOException e) {
						e.printStackTrace();
					}
				}).start();
			}
		}
	}

	static void recordClient(String host, int port, int timeout) throws Exception {
		long all = 0;
		try (Socket socket = new Socket(host, port)) {
			socket.setTcpNoDelay(true);
			socket.setSoTimeout(timeout);
			InputStream raw = socket.getInputStream();
			DataInputStream in = new DataInputStream(raw);
			DataOutputStream out = new DataOutputStream(new BufferedOutputStream(socket.getOutputStream()));
			for (int i = 0; i < RECORDS; i++) {
				byte[] want = record(i);
				out.writeInt(want.length);
				out.write(want);
				out.flush();
				byte[] got = new byte[in.readInt()];
				in.readFully(got);
				if (!Arrays.equals(got, want))
					throw new IOException("record " + i + ": got " + got.length + " bytes that differ");
				// It reads no more than what is there, as those do that have other work.
				byte[] rest = new byte[5];
				for (int n = 0; n < rest.length;) {
					int available = raw.available();
					if (available == 0) {
						Thread.sleep(1);
						continue;
					}
					n += raw.read(rest, n, Math.min(available, rest.length - n));
				}
				if (rest[3] != 1 || rest[4] != (want.length & 0x7f))
					throw new IOException("after record " + i + ": got " + Arrays.toString(rest));
				all += got.length;
			}
		}
		System.out.println(RECORDS + " records of " + all + " bytes");
	}

	public static void main(String[] args) throws Exception {
		List<String> rest = List.of(args).subList(1, args.length);
		switch (args[0]) {
		case "http-server" -> httpServer(Integer.parseInt(rest.get(0)));
		case "http-client" -> httpClient(rest.get(0), Path.of(rest.get(1)), rest.subList(2, rest.size()));
		case "url-connection" -> urlConnection(rest.get(0), Path.of(rest.get(1)), rest.subList(2, rest.size()));
		case "record-server" -> recordServer(Integer.parseInt(rest.get(0)));
		case "record-client" -> recordClient(rest.get(0), Integer.parseInt(rest.get(1)), Integer.parseInt(rest.get(2)));
		default -> throw new IllegalArgumentException(args[0]);
		}
	}
}
`

// javaOptions make it start fast and stay small.
func javaOptions() []string {
	return []string{"-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx256m", "-XX:-UsePerfData"}
}

// java compiles a class, and returns the arguments to run it.
func (s *stage) java(class, text string) []string {
	s.Helper()
	source := s.script(class+".java", text)
	var compiler []string
	for _, o := range javaOptions() {
		compiler = append(compiler, "-J"+o)
	}
	s.run(s.server, nil, "javac", append(compiler, "-nowarn", source)...)
	return append(javaOptions(), "-cp", filepath.Dir(source), class)
}

func javaHTTP(s *stage) {
	s.makeShelf()
	java := s.java("Programs", javaPrograms)
	address := s.serve(s.server, webPort, syscall.SIGTERM, "java", append(java, "http-server", fmt.Sprint(webPort))...)
	s.exchange(s.client, address, "java", append(java, "http-client")...)
	s.exchange(s.client, address, "java", append(java, "url-connection")...)
	s.exchangeByGo(s.client, address)
}

const recordsPort = 1521

func javaRecords(s *stage) {
	java := s.java("Programs", javaPrograms)
	address := s.serve(s.server, recordsPort, syscall.SIGTERM, "java", append(java, "record-server", fmt.Sprint(recordsPort))...)
	// Without a timeout a read sleeps in recv; with one it waits by poll.
	for _, timeout := range []string{"0", "100000"} {
		s.answer("%s", s.run(s.client, nil, "java", append(java, "record-client", address.Addr().String(), fmt.Sprint(recordsPort), timeout)...))
	}
	// One that is open at the end, for who looks why.
	c, err := s.dial(s.client, address.String())
	s.must("dial", err)
	s.Cleanup(func() { c.Close() })
}
